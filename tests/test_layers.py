"""The library's shape: imports go downwards only, files and functions stay small, public names are explained."""

import ast
from pathlib import Path

import pytest

import nmlib
from nmlib import runtime

FOLDER = Path(nmlib.__file__).parent
LAYERS = (
    ("attention", "config", "extra_settings", "prefetch", "runtime", "settings"),
    (
        "checkpoint",
        "conversation",
        "costs",
        "face_region",
        "folder_clips",
        "names",
        "people",
        "photo_edits",
        "photos",
        "phrases",
        "prompts",
        "records",
        "sources",
        "storage",
        "timing",
        "world",
        "world_canvas",
        "world_phrases",
        "world_portrait",
    ),
    (
        "archives",
        "batches",
        "chains",
        "clips",
        "compliance",
        "data",
        "detokenizer",
        "edit_sets",
        "face_clips",
        "face_sets",
        "faces",
        "frames",
        "full_body",
        "identity",
        "imports",
        "inspection",
        "layout",
        "links",
        "lookup",
        "lora",
        "manifest",
        "measured",
        "name_controls",
        "painted_people",
        "parquet_sets",
        "personalization",
        "readers",
        "references",
        "resampler",
        "rollback",
        "stored_sets",
        "turns",
        "vision",
    ),
    ("seedx_adapter", "seedx_files", "seedx_vision"),
    ("answer", "cache", "growing_layer", "mllm", "prefix_cache", "prefix_tree"),
    ("seedx",),
    (
        "latent_detokenizer",
        "plan",
        "seedx_checkpoint",
        "seedx_detokenizer",
        "seedx_generate",
        "seedx_inspect",
        "seedx_layout",
    ),
    ("codec", "curriculum", "judges", "packing", "train"),
    (
        "bench_setup",
        "break_conditions",
        "chat",
        "detokenizer_tuning",
        "experiments",
        "few_steps",
        "jobs",
        "latent_training",
        "metrics",
        "people_experiments",
        "plan_latents",
        "plan_stages",
        "products",
        "quality",
        "seedx_evaluation",
        "seedx_talk",
        "seedx_training",
        "throughput",
        "workloads",
    ),
    (
        "__main__",
        "bench",
        "book",
        "claims",
        "data_commands",
        "diagrams",
        "explorers",
        "kernels",
        "pipeline",
        "plots",
        "recordings",
        "seedx_chat",
        "speed_plots",
        "steps",
        "terminal",
    ),
)
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
MODULES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 40

Function = ast.FunctionDef | ast.AsyncFunctionDef


def parse(module: str) -> ast.Module:
    return ast.parse((FOLDER / f"{module}.py").read_text(encoding="utf-8"))


def body_lines(function: Function) -> int:
    """Lines of a function without its signature and docstring."""
    first = function.body[1] if ast.get_docstring(function) and len(function.body) > 1 else function.body[0]
    return (function.end_lineno or 0) - first.lineno + 1


@pytest.mark.parametrize("module", MODULES)
def test_module_has_a_layer_and_imports_downwards(module: str) -> None:
    assert module in LAYER, f"give nmlib/{module}.py a layer in {Path(__file__).name}"
    for imported in runtime.imported_modules((FOLDER / f"{module}.py").read_text(encoding="utf-8")):
        assert LAYER[imported] <= LAYER[module], f"{module} (layer {LAYER[module]}) imports {imported} from above"


def test_imports_have_no_cycle() -> None:
    seen: list[str] = []

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, f"import cycle: {' -> '.join((*above, module))}"
        if module not in seen:
            for imported in runtime.imported_modules((FOLDER / f"{module}.py").read_text(encoding="utf-8")):
                visit(imported, (*above, module))
            seen.append(module)

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_are_small(module: str) -> None:
    lines = (FOLDER / f"{module}.py").read_text(encoding="utf-8").count("\n")
    assert lines < MAX_FILE_LINES, f"nmlib/{module}.py has {lines} lines"
    for node in ast.walk(parse(module)):
        if isinstance(node, Function):
            assert body_lines(node) < MAX_FUNCTION_LINES, f"{module}.{node.name} has {body_lines(node)} lines"


@pytest.mark.parametrize("module", MODULES)
def test_public_names_are_explained(module: str) -> None:
    tree = parse(module)
    assert ast.get_docstring(tree), f"nmlib/{module}.py says not what it is"
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{module}.{node.name} has no docstring"
