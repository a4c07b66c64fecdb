"""SEED-X's released layout: inspected, loaded strictly, saved as safetensors, loaded again; faults are named."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import seedx_toy
import torch
from toy import raised

from nmlib import __main__ as cli
from nmlib import seedx_checkpoint, seedx_files
from nmlib.checkpoint import CheckpointError
from nmlib.seedx import SeedX
from nmlib.seedx_checkpoint import from_pretrained, load_agent, save_pretrained
from nmlib.seedx_generate import SeedXChat, Shown
from nmlib.seedx_inspect import inspect

AGENT = "agent/pytorch_model.bin"


@pytest.fixture
def released(tmp_path: Path) -> tuple[Path, SeedX]:
    """A folder as SEED-X releases it, and the agent in it."""
    folder = tmp_path / "pretrained" / "seed_x_i"
    return folder, seedx_toy.write_released(folder)


@torch.no_grad()
def talk(agent: SeedX) -> tuple[list[int], torch.Tensor]:
    features = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(0))
    chat = SeedXChat(agent, seedx_toy.template())
    (first,) = chat.say(["make the hat red"], [Shown(features)], force_image=True, max_new_tokens=12)
    (second,) = chat.say(["go back"], force_image=True, max_new_tokens=9)
    return first.ids + second.ids, torch.cat([first.images, second.images])


def test_round_trip(released: tuple[Path, SeedX], tmp_path: Path) -> None:
    """Inspect, load, talk, save, load, talk: the same tokens all the way."""
    folder, written = released
    report = inspect(folder)
    assert report.fits, str(report)
    system = from_pretrained(folder, seedx_toy.settings(), torch.float32)
    ids, images = talk(written)
    again, same = talk(system.agent)
    assert again == ids and torch.equal(images, same) and len(images) >= 2
    pictures = torch.randn(2, 3, seedx_toy.SIDE, seedx_toy.SIDE)
    assert system.vit is not None
    assert torch.equal(system.vit(pictures), seedx_toy.vit()(pictures)), "the prefix of Qwen-VL-Chat is known"
    assert not any(p.requires_grad for p in system.vit.parameters())
    save_pretrained(system, tmp_path / "saved", shard_size="60KB")
    assert len(list((tmp_path / "saved" / "llm").glob("*.safetensors"))) > 1
    assert not list((tmp_path / "saved").rglob("*.bin"))
    assert inspect(tmp_path / "saved").fits
    loaded = from_pretrained(tmp_path / "saved", dtype=torch.float32)
    last, still = talk(loaded.agent)
    assert last == ids and torch.equal(images, still)
    assert loaded.vit is not None and torch.equal(loaded.vit(pictures), system.vit(pictures))
    assert loaded.template.image_ids == system.template.image_ids
    card = (tmp_path / "saved" / "README.md").read_text()
    assert f"| patch positions | {4 * 40:,} |" in card and card.startswith("---\nlibrary_name: nmlib\n")


def test_number_type_and_memory(released: tuple[Path, SeedX], monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights arrive in bfloat16, none stays on the meta device or keeps the memory of its file."""
    folder, written = released
    alive: list[int] = []
    move = seedx_checkpoint.set_module_tensor_to_device

    def watched(module: Any, name: str, device: Any, value: torch.Tensor, dtype: torch.dtype) -> None:
        assert value.dtype == dtype
        alive.append(value.untyped_storage().nbytes() - value.nbytes)
        move(module, name, device, value=value, dtype=dtype)

    monkeypatch.setattr(seedx_checkpoint, "set_module_tensor_to_device", watched)
    agent = load_agent(folder, seedx_toy.settings())
    assert alive and not any(alive), "no weight keeps a larger storage, such as that of its file, alive"
    assert {t.dtype for t in agent.state_dict().values()} == {torch.bfloat16}
    assert not any(t.is_meta for t in [*agent.parameters(), *agent.buffers()])
    for name, tensor in written.state_dict().items():
        assert torch.equal(agent.state_dict()[name], tensor.bfloat16())
    frequencies = agent.llm.model.rotary_emb.inv_freq
    assert torch.equal(frequencies, written.llm.model.rotary_emb.inv_freq), "computed anew, not read"


@pytest.mark.parametrize("lora", ["old", "new"])
def test_both_names_of_lora(tmp_path: Path, lora: str) -> None:
    folder = tmp_path / "pretrained" / "tuned"
    written = seedx_toy.write_released(folder, lora=lora)
    report = inspect(folder)
    assert report.fits, str(report)
    assert ("LoRA as peft 0.4 names it" in str(report)) == (lora == "old")
    agent = load_agent(folder, seedx_toy.settings(), torch.float32)
    assert agent.has_lora
    features = torch.randn(1, 2, 16, 32)
    batch = seedx_toy.template().batch([seedx_toy.template().edit("make the hat red", "yes")])
    before = agent(batch, features)
    torch.testing.assert_close(before.total, written(batch, features).total)
    message = raised(
        lambda: save_pretrained(seedx_checkpoint.System(agent, None, seedx_toy.template()), tmp_path / "s"),
        CheckpointError,
    )
    assert message.endswith("the agent has LoRA beside its weights; call merge_lora() first")
    agent.merge_lora()
    torch.testing.assert_close(agent(batch, features).total, before.total, rtol=1e-4, atol=1e-5)
    save_pretrained(seedx_checkpoint.System(agent, None, seedx_toy.template()), tmp_path / "saved")
    again = load_agent(tmp_path / "saved", seedx_toy.settings(), torch.float32)
    torch.testing.assert_close(again(batch, features).total, before.total, rtol=1e-4, atol=1e-5)


def change(file: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = torch.load(file, weights_only=True)
    edit(tensors)
    torch.save(tensors, file)


@pytest.mark.parametrize(
    ("edit", "fault"),
    [
        (lambda t: t.pop("output_resampler.query"), "missing output_resampler.query (4, 32)"),
        (lambda t: t.update(gate=torch.zeros(3)), "unexpected gate"),
        (lambda t: t.update(patch_pos_embed=torch.zeros(4, 39)), "patch_pos_embed has shape (4, 39), expected (4, 40)"),
    ],
)
def test_one_wrong_key_of_the_agent_is_named(released: tuple[Path, SeedX], edit: Any, fault: str) -> None:
    folder, _ = released
    change(folder / AGENT, edit)
    text = raised(lambda: load_agent(folder, seedx_toy.settings()), CheckpointError)
    assert text == f"{folder / AGENT}: does not fit SeedX: {fault}"
    report = inspect(folder)
    assert not report.fits
    if "query" not in fault:  # which also tells the sizes
        assert [part.faults for part in report.parts if part.faults] == [[fault]]


@pytest.mark.parametrize("kind", ["missing", "unexpected", "has shape (3, 40), expected (40, 40)"])
def test_one_wrong_key_of_a_shard_is_named(released: tuple[Path, SeedX], kind: str) -> None:
    folder, _ = released
    name = "model.layers.1.self_attn.o_proj.weight"
    weight_map = json.loads((folder / "llm" / "pytorch_model.bin.index.json").read_text())["weight_map"]
    edits: dict[str, Any] = {"missing": lambda t: t.pop(name), "unexpected": lambda t: t.update(extra=torch.ones(1))}
    change(folder / "llm" / weight_map[name], edits.get(kind, lambda t: t.update({name: torch.ones(3, 40)})))
    text = raised(lambda: load_agent(folder, seedx_toy.settings()), CheckpointError)
    expected = {"missing": f"missing llm.{name} (40, 40)", "unexpected": "unexpected llm.extra"}
    fault = expected.get(kind, f"llm.{name} {kind}")
    assert text == f"{folder / 'llm'}: does not fit SeedX: {fault}"
    assert [part.faults for part in inspect(folder).parts if part.faults] == [[fault]]


def test_parts_beside_the_folder_are_found_from_within(
    released: tuple[Path, SeedX], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = released
    monkeypatch.chdir(folder)
    found = seedx_checkpoint.find_part(Path(), "vit")
    assert found is not None and found.samefile(folder.parent / "QwenViT")


def test_what_is_not_there_is_named(released: tuple[Path, SeedX], tmp_path: Path) -> None:
    folder, _ = released
    settings = seedx_toy.settings()
    (folder / "llm" / "pytorch_model-00002-of-00003.bin").unlink()
    text = raised(lambda: load_agent(folder, settings), CheckpointError)
    assert text == f"{folder / 'llm'}: 1 of 3 shards are missing: pytorch_model-00002-of-00003.bin"
    assert text in str(inspect(folder))
    shutil.rmtree(folder.parent / "QwenViT")
    text = raised(lambda: seedx_checkpoint.load_vit(folder, settings), CheckpointError)
    assert text == f"{folder}: no vit; expected it at vit or QwenViT or ../QwenViT"
    shutil.rmtree(folder / "agent")
    report = str(inspect(folder))
    assert "vit          not found" in report and "- missing: expected at agent" in report
    (tmp_path / "empty").mkdir()
    assert "nothing of SEED-X here" in raised(lambda: inspect(tmp_path / "empty"), CheckpointError)
    assert "no such folder" in raised(lambda: inspect(tmp_path / "nowhere"), CheckpointError)
    assert "no such folder" in raised(lambda: from_pretrained(tmp_path / "nowhere", settings), CheckpointError)


def test_settings_that_shapes_do_not_show(released: tuple[Path, SeedX]) -> None:
    folder, _ = released
    path = folder / "llm" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_attention_heads": 4}))
    text = raised(lambda: load_agent(folder, seedx_toy.settings()), CheckpointError)
    assert text == f"{path}: num_attention_heads is 4, expected 5; give the right settings"


class Boom:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("boom"),))


def test_a_pickle_that_would_run_code_is_refused(
    released: tuple[Path, SeedX], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = released
    monkeypatch.chdir(tmp_path)
    torch.save({"query": Boom()}, folder / AGENT)
    for old in (False, True):
        if old:
            (folder / AGENT).write_bytes(pickle.dumps({"query": Boom()}, protocol=2))
        text = raised(lambda: load_agent(folder, seedx_toy.settings()), CheckpointError)
        assert text.startswith(f"{folder / AGENT}: refused, for reading it may run code (") and "\n" not in text
        assert text.endswith("; expected tensors only, get a safetensors copy")
        assert not inspect(folder).fits
    assert not (tmp_path / "boom").exists()


def test_files_that_are_not_what_they_should_be(released: tuple[Path, SeedX], tmp_path: Path) -> None:
    folder, _ = released
    file = folder / AGENT

    def text() -> str:
        return raised(lambda: load_agent(folder, seedx_toy.settings()), CheckpointError)

    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert text().startswith(f"{file}: damaged or truncated (")
    torch.save({"step": 3}, file)
    assert text() == f"{file}: 'step' is int; expected a tensor"
    torch.save([torch.zeros(1)], file)
    assert text() == f"{file}: holds list; expected a dictionary of tensors"
    index = folder / "llm" / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.bin"}}))
    assert text() == f"{index}: shard '../../secret.bin' lies outside its folder; expected a plain name"
    index.write_text("{}")
    assert text() == f"{index}: no `weight_map` of tensors to files; fetch it again"
    parts = [tmp_path / "a.bin", tmp_path / "b.bin"]
    for part in parts:
        torch.save({"twice": torch.zeros(1)}, part)
    twice = raised(lambda: seedx_files.headers_of(parts), CheckpointError)
    assert twice == f"{parts[1]}: twice stands in a.bin too; expected it once"


def test_old_torch_files_are_read(released: tuple[Path, SeedX]) -> None:
    folder, written = released
    own = {name: t for name, t in written.state_dict().items() if not name.startswith("llm.")}
    torch.save(own, folder / AGENT, _use_new_zipfile_serialization=False)
    agent = load_agent(folder, seedx_toy.settings(), torch.float32)
    assert torch.equal(agent.patch_pos_embed, written.patch_pos_embed)


def test_command_line(released: tuple[Path, SeedX], capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = released
    codes = []
    for _ in range(2):
        with pytest.raises(SystemExit) as caught:
            cli.main(["checkpoint", "inspect", str(folder)])
        codes.append(caught.value.code or 0)
        out, err = capsys.readouterr()
        if codes == [0]:
            assert "llm          3 shards .bin, float32, 30 tensors" in out and ", 1 ignored" in out
            assert "not the released ones" in out and "tokenizer    348 words" in out
            change(folder / AGENT, lambda t: t.update(gate=torch.zeros(3)))
    assert codes == [0, 1] and "- unexpected gate" in out
    assert err == f"{folder}: does not fit; see the lines with a dash above\n"
