"""One line on the terminal for a run of notebooks: which one, how far, and how long it will take.

Progress bars inside a notebook reach this process as text with carriage returns. On a terminal they are shown
on one line behind the notebook's place in the run; in a log file only finished lines, and one line every
half minute, are written.
"""

import re
import shutil
import sys
import time
from collections.abc import Mapping, Sequence

from tqdm import tqdm

_CLEAR = "\x1b[K"
_LOG_EVERY_SECONDS = 30.0


class Terminal:
    """Shows a run on stderr; a file-like object for what the notebooks themselves write there.

    Args:
        names: the notebooks, in order.
        minutes: what each is expected to take, as far as known.
    """

    def __init__(self, names: Sequence[str], minutes: Mapping[str, float]) -> None:
        self._names = list(names)
        self._minutes = dict(minutes)
        self._done = 0
        self._started = time.monotonic()
        self._line = ""
        self._written = 0.0
        self._live = sys.stderr.isatty()
        self._bar = tqdm(
            total=len(self._names),
            desc="notebooks",
            file=sys.stderr,
            disable=not self._live,
            ncols=80,
            nrows=20,
            bar_format="{desc} {bar:24} {n_fmt}/{total_fmt} {postfix}",
        )

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *error: object) -> None:
        self._end_line()
        self._bar.close()

    def skip(self, name: str) -> None:
        """A notebook is up to date."""
        self._say(f"{name}: up to date")
        self._advance()

    def start(self, name: str, reason: str) -> None:
        """A notebook starts."""
        self._started = time.monotonic()
        self._say(f"{name}: running ({reason})")
        self._bar.set_postfix_str(self.left())

    def finish(self, minutes: float, memory_gb: float) -> None:
        """The notebook that started last has ended well."""
        name = self._names[self._done]
        self._minutes[name] = minutes
        self._end_line()
        self._say(f"{name}: {minutes:.1f} min, peak memory {memory_gb:.1f} GB")
        self._advance()

    def left(self) -> str:
        """The estimate of the time left, from what the notebooks took before; empty when nothing is known."""
        ahead = self._names[self._done :]
        known = [self._minutes[name] for name in self._names if name in self._minutes]
        if not ahead or not known:
            return ""
        usual = sum(known) / len(known)
        elapsed = (time.monotonic() - self._started) / 60
        current = max(self._minutes.get(ahead[0], usual) - elapsed, 0.0)
        minutes = current + sum(self._minutes.get(name, usual) for name in ahead[1:])
        return f"about {minutes:.0f} min left" if minutes >= 1 else "less than a minute left"

    def write(self, text: str) -> int:
        """Show text of a notebook; carriage returns start its line again."""
        for part in re.split(r"([\r\n])", text):
            if part == "\n":
                self._end_line()
            elif part == "\r":
                self._line = ""
            else:
                self._line += part
        self._show()
        return len(text)

    def flush(self) -> None:
        """Nothing is held back."""
        sys.stderr.flush()

    def _prefix(self) -> str:
        left = self.left()
        return f"[{self._done + 1}/{len(self._names)}{', ' + left if left else ''}] "

    def _show(self) -> None:
        """Draw the line in progress."""
        now = time.monotonic()
        if not self._line.strip():
            return
        if self._live:
            self._bar.clear()
            line = (self._prefix() + self._line)[: shutil.get_terminal_size((120, 24)).columns - 1]
            sys.stderr.write(f"\r{_CLEAR}{line}")
        elif now - self._written > _LOG_EVERY_SECONDS:
            self._written = now
            sys.stderr.write(f"{self._prefix()}{self._line}\n")

    def _end_line(self) -> None:
        """Keep the line in progress and start a new one."""
        if self._line.strip():
            start = f"\r{_CLEAR}" if self._live else ""
            sys.stderr.write(f"{start}{self._prefix()}{self._line}\n")
        self._line = ""

    def _say(self, text: str) -> None:
        self._bar.clear()
        sys.stderr.write(text + "\n")
        self._bar.refresh()

    def _advance(self) -> None:
        self._done += 1
        self._bar.update()
        self._bar.set_postfix_str(self.left())
