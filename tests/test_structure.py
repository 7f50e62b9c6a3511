"""Checks of the sources: allowed imports, modules that load lazily, and coding conventions. Parses the sources and starts a few processes."""

import ast
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import ROOT

ALLOWED_IMPORTS = {
    "vqmosaic": {"vqmosaic"},
    "token_shards": {"token_shards", "vqmosaic"},
    "stage1_tokenizer": {"stage1_tokenizer", "token_shards", "vqmosaic"},
    "stage2_prior": {"stage2_prior", "token_shards", "vqmosaic"},
    "pipelines": {"pipelines", "stage1_tokenizer", "stage2_prior", "token_shards", "vqmosaic"},
}
"""The allowed imports between packages, as in ARCHITECTURE.md. No package imports tests or benchmarks."""
OWN_PACKAGES = {*ALLOWED_IMPORTS, "configs", "tests", "benchmarks"}
SOURCES = sorted(path for package in ALLOWED_IMPORTS for path in (ROOT / package).rglob("*.py"))
OPTIONAL_LIBRARIES = {"gradio", "starlette", "uvicorn", "diffusers", "lpips", "torchvision", "tensorboard", "wandb", "matplotlib", "torch_fidelity"}
MAX_LINES = 380


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(tree: ast.Module) -> set[str]:
    """Dotted names of all imports, including those inside functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def dotted_strings(tree: ast.Module) -> set[str]:
    """Strings that are the dotted path of a module of this project, or of a name in one."""
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    dotted = {text for text in texts if re.fullmatch(rf"({'|'.join(ALLOWED_IMPORTS)})(\.\w+)+", text)}
    modules = {name_of(path).removesuffix(".py").replace("/", ".") for path in SOURCES}
    return {text for text in dotted if text in modules or text.rpartition(".")[0] in modules}


def packages_of(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names} & OWN_PACKAGES


# --- imports -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_between_packages_are_allowed(path):
    package = path.relative_to(ROOT).parts[0] if path.name != "__main__.py" else "pipelines"  # __main__ only calls the command, which is in pipelines
    assert packages_of(imported(tree_of(path)) | dotted_strings(tree_of(path))) <= ALLOWED_IMPORTS[package]


def test_forbidden_imports_are_detected():
    tree = ast.parse("def late():\n    from stage1_tokenizer.image_files.images import View\n"
                     "HOME = {'x': 'pipelines.stages.chain'}\nimport benchmarks.speed")
    assert packages_of(imported(tree) | dotted_strings(tree)) == {"stage1_tokenizer", "pipelines", "benchmarks"}


def module_of(path: Path) -> str:
    return name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def modules_in_cycles(imports: dict[str, set[str]]) -> set[str]:
    """The modules that are part of an import cycle or depend on one."""
    remaining = {module: {name for name in names if name in imports} - {module} for module, names in imports.items()}
    while leaves := {module for module, names in remaining.items() if not names}:
        remaining = {module: names - leaves for module, names in remaining.items() if module not in leaves}
    return set(remaining)


def test_no_import_cycles():
    assert not modules_in_cycles({module_of(path): imported(tree_of(path)) for path in SOURCES if path.name != "__init__.py"})


def test_import_cycles_are_detected():
    assert modules_in_cycles({"a": {"b"}, "b": {"c", "torch"}, "c": {"b"}, "d": set()}) == {"a", "b", "c"}


def test_no_folder_has_too_many_files():
    counts = {folder: len(list(folder.glob("*.py"))) for folder in {path.parent for path in SOURCES}}
    assert max(counts.values()) <= 16, counts


def test_all_packages_are_checked_and_in_the_wheel():
    found = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "benchmarks", "configs"}
    assert found == set(ALLOWED_IMPORTS)
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {name_of(path.parent).replace("/", ".") for path in SOURCES}
    assert folders | {"configs"} == set(listed)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_optional_libraries_are_imported_lazily(path):
    if name_of(path).startswith("pipelines/demo"):  # modules of the demo extra, which are imported lazily themselves
        return
    top_level = {name for node in tree_of(path).body if isinstance(node, ast.Import | ast.ImportFrom)
                  for name in imported(ast.Module(body=[node], type_ignores=[]))}
    assert not {name.partition(".")[0] for name in top_level} & OPTIONAL_LIBRARIES


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_classes_are_not_selected_by_dotted_strings(path):
    lazy_tables = {"stage2_prior/__init__.py", "stage1_tokenizer/tokenizer_config.py"}
    stages = {"pipelines/stages/chain.py": {"stage1_tokenizer.train", "pipelines.stages.preprocess", "pipelines.stages.train_prior"}}
    if name_of(path) not in lazy_tables:
        assert dotted_strings(tree_of(path)) <= stages.get(name_of(path), set())
    calls = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Attribute) and node.attr == "import_module"]
    assert not calls or path.name == "__init__.py" or name_of(path) in ("vqmosaic/runs/launch.py", "stage1_tokenizer/tokenizer_config.py")


# --- loaded modules ----------------------------------------------------------------------------------------------------------


def modules_after(code: str) -> set[str]:
    """Names in sys.modules of a new process after it ran `code`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    report = "\nimport sys, json\nprint('MODULES' + json.dumps(sorted(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code + report], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout.partition("MODULES")[2]))


def called(*arguments: str) -> str:
    """Code that runs the vqmosaic command and ignores its exit code."""
    return (f"from pipelines.command_line import main\nimport sys\nsys.argv = ['vqmosaic', *{list(arguments)}]\n"
            "try:\n    main()\nexcept SystemExit:\n    pass")


def loaded(modules: set[str], *names: str) -> set[str]:
    """The packages or modules in `names` that were loaded, or of which a submodule was loaded. `modules` are the names in sys.modules."""
    return {name for name in names if any(module == name or module.startswith(f"{name}.") for module in modules)}


SLOW = ("torch", "transformers", "accelerate", "datasets", "pyarrow", "sklearn", "gradio", "torchmetrics", "webdataset", "scipy")


@pytest.mark.parametrize("code", [
    "import vqmosaic, token_shards, stage1_tokenizer, stage2_prior, pipelines",
    "from vqmosaic.recipes.recipe_files import load_recipe\nload_recipe('digits')",
    "from stage2_prior import SamplingConfig",
    called("--help"),
    called("run", "--help"),
    called("run", "digts"),
    called("run", "digits", "--tokenizer.codebok_size=3"),
    called("run", "digits", "--data.image_size=18"),
    called("run", "image_folder", "--data.path=/nowhere/at/all"),
    called("preprocess", "digits", "--run_dir=/tmp/vqmosaic-there-is-no-such-run"),
    called("generate", "/nowhere/at/all"),
], ids=["packages", "recipe", "sampling config", "help", "run help", "recipe name", "key", "combination", "path", "missing input", "pipeline"])
def test_slow_libraries_are_not_loaded(code):
    assert not loaded(modules_after(code), *SLOW)


def test_generation_loads_no_training_or_data_set_code(tiny_run):
    modules = modules_after("from pipelines import ImageGenerationPipeline\n"
                            f"pipe = ImageGenerationPipeline.from_pretrained({str(tiny_run)!r})\npipe('3')")
    own = {module for module in modules if module.partition(".")[0] in ALLOWED_IMPORTS}
    training = {"stage1_tokenizer.train", "stage2_prior.train", "stage2_prior.token_batches", "pipelines.stages.preprocess", "pipelines.stages.chain",
                "pipelines.stages.train_prior", "pipelines.command_line",
                "vqmosaic.training.training_run", "vqmosaic.training.checkpoints", "vqmosaic.training.tracking", "vqmosaic.runs.accelerator",
                "vqmosaic.runs.launch"}
    data = {"stage1_tokenizer.data.image_sources", "stage1_tokenizer.data.image_batches", "stage1_tokenizer.data.digits_source",
            "stage1_tokenizer.data.folder_source", "stage1_tokenizer.data.huggingface_source", "stage1_tokenizer.data.data_location",
            "token_shards.reader", "token_shards.writer"}
    assert {"pipelines.generate", "stage1_tokenizer.tokenizer", "stage2_prior.prior"} <= own
    assert not own & (training | data)
    assert not loaded(modules, "datasets", "pyarrow", "gradio", "torchmetrics", "webdataset", "jsonargparse", "tensorboard",
                      "accelerate.commands.launch")


def test_image_folders_need_no_data_set_library(tmp_path):
    code = f"""
from pathlib import Path
from PIL import Image
folder = Path({str(tmp_path)!r})
for number in range(4):
    Image.new("RGB", (9, 9), (number, 0, 0)).save(folder / f"{{number}}.png")
from stage1_tokenizer.data.image_batches import TrainingImages
from stage1_tokenizer.data.open_data import open_splits
from stage1_tokenizer.image_files.images import ImageTransform
from vqmosaic.recipes.recipe_sections import DataConfig
data = DataConfig(path=str(folder), image_size=16)
next(TrainingImages(open_splits(data).train, ImageTransform(image_size=16, channels=3), data, 0).batches(0, 2))
"""
    assert not loaded(modules_after(code), "datasets", "pyarrow", "gradio", "sklearn", "transformers", "torchvision")


# --- conventions -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_are_short_and_have_specific_names(path):
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_LINES, f"{lines} lines"
    assert not re.search(r"(^|_)(utils?|helpers?|misc|common)(_|$)", path.stem)


def unsafe_loading(tree: ast.Module) -> list[str]:
    """Imports of pickle and similar modules, and calls that may unpickle or execute data."""
    pickle_modules = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve")
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle"}
    only_error = used == {"UnpicklingError"}  # torch.load raises this error for files that are no checkpoint, so it may be caught
    found = [f"imports {name}" for name in imported(tree) if name.partition(".")[0] in pickle_modules and not (name == "pickle" and only_error)]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        keywords = {keyword.arg: getattr(keyword.value, "value", "?") for keyword in node.keywords}
        function = ast.unparse(node.func)
        if keywords.get("weights_only", True) is not True:
            found.append(f"line {node.lineno}: weights_only is not True")
        if keywords.get("allow_pickle", False) is not False:
            found.append(f"line {node.lineno}: allow_pickle is not False")
        if keywords.get("trust_remote_code", False) is not False:
            found.append(f"line {node.lineno}: trust_remote_code is not False")
        if function == "torch.load" and "weights_only" not in keywords:
            found.append(f"line {node.lineno}: torch.load without weights_only=True")
        if function in ("np.load", "numpy.load", "np.lib.format.read_array") and "allow_pickle" not in keywords:
            found.append(f"line {node.lineno}: {function} without allow_pickle=False")
        if function in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec", "torch.save") or "register_for_checkpointing" in function:
            found.append(f"line {node.lineno}: {function}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_sources_never_unpickle(path):
    assert not unsafe_loading(tree_of(path))


def test_unsafe_loading_is_detected():
    for line in (  # These lines are parsed, never run. The check must detect each of them.
            "import pickle", "from pickle import loads", "import pickle\npickle.UnpicklingError, pickle.load", "from dill import loads",
            "torch.load(path)", "torch.load(path, weights_only=False)", "np.load(path)", "np.load(path, allow_pickle=True)", "yaml.load(text)",
            "accelerator.register_for_checkpointing(state)", "eval(text)"):
        assert unsafe_loading(ast.parse(line)), line
    assert not unsafe_loading(ast.parse("torch.load(path, weights_only=True); np.load(path, allow_pickle=False); model.eval()"))


@functools.cache
def documented_in_base_classes() -> set[str]:
    """Methods that a protocol, a base class or torch documents, so that implementations need no docstring."""
    classes = [node for path in SOURCES for node in ast.walk(tree_of(path)) if isinstance(node, ast.ClassDef)]
    bases = {ast.unparse(base) for node in classes for base in node.bases}
    protocols = [node for node in classes if node.name in bases or any(ast.unparse(base) == "Protocol" for base in node.bases)]
    return {"forward"} | {inner.name for node in protocols for inner in node.body if isinstance(inner, ast.FunctionDef) and ast.get_docstring(inner)}


def missing_docstrings(tree: ast.Module) -> list[str]:
    """Public modules, functions, classes and methods without a docstring."""
    missing = [] if ast.get_docstring(tree) else ["the module"]
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            missing.append(node.name)
        for inner in node.body if isinstance(node, ast.ClassDef) else []:
            is_public = isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_") and inner.name not in documented_in_base_classes()
            if is_public and not ast.get_docstring(inner):
                missing.append(f"{node.name}.{inner.name}")
    return missing


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_public_names_have_docstrings(path):
    assert not missing_docstrings(tree_of(path))


def test_missing_docstrings_are_detected():
    assert missing_docstrings(ast.parse("class A:\n    def b(self):\n        pass")) == ["the module", "A", "A.b"]


@pytest.mark.parametrize("stage", ["stage1_tokenizer/train.py", "stage2_prior/train.py", "pipelines/stages/preprocess.py",
                                   "pipelines/stages/train_prior.py"])
def test_scripts_document_their_command(stage):
    assert "    vqmosaic " in ast.get_docstring(tree_of(ROOT / stage), clean=False)
