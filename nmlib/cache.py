"""What a conversation remembers of its pictures: predicted tokens in a tree.

`TokenCache` keeps the *predicted* tokens of every picture exactly (paper: token-level caching); undo and branch
move a pointer in its tree. What the model has read of a branch is kept by `prefix_cache`.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nmlib import checkpoint


class CacheError(KeyError):
    """A node that is not in the tree; the message lists what is there."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class Node:
    """One picture of a session.

    Args:
        id: number, in order of creation.
        parent: the node before it on its branch; None at the root.
        kind: `upload`, `describe` or `edit`.
        instruction: what the person said.
        response: what the model said before the picture.
        base: the node it started from as the model said it; None if it said nothing.
        seed: of the detokenizer's noise.
    """

    id: int
    parent: int | None
    kind: str
    instruction: str
    response: str
    base: int | None
    seed: int


class TokenCache:
    """A tree of rounds whose picture tokens are kept bit for bit, with a pointer to the current one."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self._tokens: list[Tensor] = []
        self.current: int | None = None

    def __len__(self) -> int:
        return len(self.nodes)

    def node(self, id_: int) -> Node:
        """The node of that number; raises CacheError with the numbers that exist."""
        if not 0 <= id_ < len(self.nodes):
            there = f"has 0 to {len(self.nodes) - 1}" if self.nodes else "is empty"
            raise CacheError(f"no picture {id_} in this session; it {there}")
        return self.nodes[id_]

    def tokens(self, id_: int) -> Tensor:
        """The tokens (N, D_feature) of a node, exactly as they were predicted."""
        return self._tokens[self.node(id_).id]

    def append(self, tokens: Tensor, **fields: Any) -> Node:
        """Add a picture after the current one and move there.

        Args:
            tokens: (N, D_feature).
            fields: of `Node`, without `id` and `parent`.
        """
        node = Node(id=len(self.nodes), parent=self.current, **fields)
        self.nodes.append(node)
        self._tokens.append(tokens.detach().cpu().clone())
        self.current = node.id
        return node

    def path(self, id_: int | None = None) -> list[Node]:
        """Nodes from the root to a node (the current one by default): the history that the model sees."""
        steps: list[Node] = []
        cursor = self.current if id_ is None else id_
        while cursor is not None:
            steps.append(self.node(cursor))
            cursor = steps[-1].parent
        return steps[::-1]

    def undo(self) -> Node:
        """Move to the parent of the current node.

        Raises:
            CacheError: there is nothing before it.
        """
        if self.current is None or self.node(self.current).parent is None:
            raise CacheError("nothing to undo: this is the first picture of the session")
        return self.go_to(self.node(self.current).parent)  # type: ignore[arg-type]

    def go_to(self, id_: int) -> Node:
        """Move to any node; what is said next branches off there."""
        node = self.node(id_)
        self.current = node.id
        return node

    def children(self, id_: int) -> list[Node]:
        """Nodes that continue a node."""
        return [node for node in self.nodes if node.parent == id_]

    def save(self, path: Path) -> None:
        """Write tree and tokens as one safetensors file with JSON metadata, atomically."""
        tensors = {str(id_): tokens for id_, tokens in enumerate(self._tokens)}
        checkpoint.save(path, tensors, {"nodes": [asdict(node) for node in self.nodes], "current": self.current})

    @classmethod
    def load(cls, path: Path) -> "TokenCache":
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, or holds something else.
        """
        tensors, metadata = checkpoint.load(path)
        if "nodes" not in metadata:
            raise checkpoint.CheckpointError(f"{path}: holds no session; expected a file that `TokenCache.save` wrote")
        cache = cls()
        cache.nodes = [Node(**raw) for raw in metadata["nodes"]]
        cache._tokens = [tensors[str(node.id)] for node in cache.nodes]
        cache.current = metadata["current"]
        return cache
