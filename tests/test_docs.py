"""Every command and every example in the documentation is run here, or by a test named here."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# Commands too long for this test, with the test (or build step) that runs them instead.
ELSEWHERE = {
    "make demo": "tests/test_docs.py::test_make_targets_do_their_own_setup",
    "make test": "Makefile::test",
    "make bench": "Makefile::bench",
    "make install": "Makefile::install",
    "make format": "Makefile::format",
    "make sanitize": "Makefile::sanitize",
    ".venv/bin/pytest tests/ops -n 2": "Makefile::pytest",
    ".venv/bin/pytest tests/engine/test_evaluate.py -k paired": "Makefile::pytest",
    "make gpu-check": "tests/test_gpu_check.py::test_whole_record",
    "python3 -m pip install --no-build-isolation --no-deps -e .": "tests/test_build.py::--no-deps",
    "python3 -m benchmarks.gpu_check --output gpu.json": (
        "tests/test_gpu_check.py::test_whole_record"
    ),
    "pip install -e .": "tests/test_build.py::test_installs_without_a_compiler",
    "pip install --no-build-isolation -e .": "tests/test_build.py::--no-build-isolation",
    "pip install -e '.[train,vision]'": "Makefile::test",
    "uv venv": "docs/install.md::uv",
    "uv pip install torch numpy setuptools cmake ninja": "docs/install.md::uv",
    "uv pip install --no-build-isolation -e .": "docs/install.md::uv",
    "dvla-fast demo --quick": "tests/engine/test_demo.py::demo",
    "pytest benchmarks/ --benchmark-only": "tests/test_benchmarks.py::test_every_benchmark_runs",
    "pytest benchmarks/ --benchmark-only --benchmark-json=run.json": (
        "tests/test_benchmarks.py::test_every_benchmark_runs"
    ),
    "python -m benchmarks.ratios run.json": "tests/test_benchmarks.py::test_ratio_table",
    "dvla-fast semantics encode birds.json --encoder open_clip:ViT-B-16/openai": (
        "tests/engine/test_bank_commands.py::test_encode_with_a_model"
    ),
    "dvla-fast semantics import semantic.pth --attributes attributes.pth --output banks/cub.json": (
        "tests/semantics/test_importing.py::test_import_command"
    ),
    "dvla-fast data check photos/": "tests/test_cli.py::test_data_check",
    "dvla-fast data check CUB_200_2011/ --splits cub_100_50_50": (
        "tests/data/test_layouts.py::test_cub"
    ),
    "dvla-fast data check caches/cub-224": "tests/data/test_check.py::test_cache",
    "dvla-fast data prepare CUB_200_2011/ --splits cub_100_50_50 --output caches/cub-224": (
        "tests/test_cli.py::test_prepared_cache_from_pretraining_to_evaluation"
    ),
    "dvla-fast pretrain --data.dataset caches/cub-224 --data.image_size 224"
    " --pretrain.augment.flip true": (
        "tests/test_cli.py::test_prepared_cache_from_pretraining_to_evaluation"
    ),
    "pytest benchmarks/test_image_cache.py --benchmark-only": (
        "tests/test_benchmarks.py::test_every_benchmark_runs"
    ),
    "dvla-fast pretrain --output runs/backbone": "tests/engine/test_demo.py::demo",
    "dvla-fast metatune --output runs/tuned --checkpoint"
    " runs/backbone/checkpoints/pretrain-best.safetensors": "tests/test_cli.py::metatune",
    "python -m benchmarks.policy_gradient --digits": "tests/engine/test_gating.py::--digits",
    "dvla-fast metatune --output runs/grpo --checkpoint"
    " runs/backbone/checkpoints/pretrain-best.safetensors --metatune.objective grpo": (
        "tests/engine/test_gating.py::grpo"
    ),
    "dvla-fast evaluate --output runs/result --checkpoint"
    " runs/tuned/checkpoints/metatune-best.safetensors": "tests/test_cli.py::evaluate",
    "dvla-fast evaluate --output runs/second --checkpoint"
    " runs/other/checkpoints/metatune-best.safetensors --compare runs/result": (
        "tests/engine/test_compare.py::--compare"
    ),
    "dvla-fast evaluate --config runs/seed-1/config.yaml --seed 0 --output a/seed-1 --checkpoint"
    " runs/seed-1/checkpoints/metatune-best.safetensors": (
        "tests/test_cli.py::test_printed_next_commands_work"
    ),
    "dvla-fast predict photos/ --checkpoint runs/tuned/checkpoints/metatune-best.safetensors"
    " --supports birds/ --bank birds.json": (
        "tests/engine/test_predict_images.py::test_folder_with_and_without_labels"
    ),
    "dvla-fast metatune --model.backbone clip --model.clip_model ViT-B-16-quickgelu"
    " --model.pretrained openai --data.dataset photos/ --data.image_size 224"
    " --semantics.bank bank.json": ("tests/engine/test_starting.py::test_clip_without_pretraining"),
    "dvla-fast metatune --model.backbone visformer_tiny --checkpoint visformer-CUB.pth"
    " --data.dataset caches/cub-224 --data.image_size 224 --semantics.bank bank.json": (
        "tests/engine/test_starting.py::test_visformer_from_the_authors_file"
    ),
    "dvla-fast evaluate --checkpoint visformer-CUB.pth --data.dataset caches/cub-224"
    " --data.image_size 224": "tests/engine/test_starting.py::test_authors_backbone_alone",
    "dvla-fast semantics build --data.dataset photos/ --output bank.json": (
        "tests/engine/test_bank_build.py::test_bank_of_a_folder"
    ),
    "dvla-fast semantics build --construct.classes names.txt --output bank.json": (
        "tests/engine/test_bank_build.py::test_settings_from_a_file"
    ),
    "dvla-fast pretrain --config configs/cub_1shot.yaml --output runs/cub-backbone": (
        "tests/test_configs.py::PretrainRun"
    ),
    "dvla-fast metatune --config configs/cub_1shot.yaml --output runs/cub_1shot --checkpoint"
    " runs/cub-backbone/checkpoints/pretrain-best.safetensors": (
        "tests/test_configs.py::MetatuneRun"
    ),
    "dvla-fast evaluate --config configs/cub_1shot.yaml --output runs/cub_1shot-result --checkpoint"
    " runs/cub_1shot/checkpoints/metatune-best.safetensors": ("tests/test_configs.py::EvaluateRun"),
    "torchrun --nproc_per_node 2 -m dvla_fast metatune --output runs/tuned --checkpoint"
    " runs/backbone/checkpoints/pretrain-best.safetensors": (
        "tests/engine/test_distributed.py::MASTER_PORT"
    ),
    "python -m benchmarks.training --image-size 84": (
        "tests/test_benchmarks.py::benchmarks.training"
    ),
    "export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647": (
        "tests/engine/test_free_memory.py::test_freed_memory_is_kept"
    ),
    "python -m benchmarks.tables": "tests/test_tables.py::tables.main",
    "dvla-fast report runs/backbone runs/tuned runs/result --output report.html": (
        "tests/report/test_report.py::test_sound_run_is_shown_whole"
    ),
    "dvla-fast report a/seed-0 a/seed-1 b/seed-0 b/seed-1 --text_only --table table.tex": (
        "tests/report/test_table.py::test_latex"
    ),
    "dvla-fast report runs/result --shot 5 --episodes [0,17] --output episodes.html": (
        "tests/report/test_report.py::test_chosen_episodes"
    ),
    "dvla-fast compare runs/result runs/second": "tests/engine/test_compare.py::test_command_line",
    'dvla-fast compare runs/result runs/result --method_b "fixed gate"': (
        "tests/engine/test_compare.py::--method_b"
    ),
    "dvla-fast compare a/seed-0,a/seed-1 b/seed-0,b/seed-1": (
        "tests/engine/test_compare.py::test_several_seeds_a_side"
    ),
    "dvla-fast ablate configs/ablation_digits.yaml --output runs/ablation-digits": (
        "tests/engine/test_ablation_variants.py::ablation_digits"
    ),
    "dvla-fast ablate configs/ablation_shapes.yaml --output runs/ablation-shapes": (
        "tests/engine/test_ablation_variants.py::ablation_shapes"
    ),
    "dvla-fast ablate configs/ablation_shapes_varied.yaml --output runs/ablation-shapes-varied": (
        "tests/engine/test_ablation_variants.py::ablation_shapes_varied"
    ),
    "dvla-fast metatune --resume --output runs/tuned": "tests/engine/test_resume.py::resume",
}


def blocks(language: str) -> list[tuple[str, str]]:
    pattern = re.compile(rf"```{language}\n(.*?)```", re.DOTALL)
    return [(page.name, text) for page in PAGES for text in pattern.findall(page.read_text())]


def commands() -> list[tuple[str, str]]:
    lines = [(page, line) for page, text in blocks("bash") for line in text.splitlines()]
    return sorted({(page, line.split("  #")[0].strip()) for page, line in lines if line.strip()})


@pytest.mark.parametrize(("page", "command"), commands(), ids=lambda value: value)
def test_documented_command(page: str, command: str) -> None:
    if command in ELSEWHERE:
        where, name = ELSEWHERE[command].split("::")
        assert name in (ROOT / where).read_text(), f"{where} no longer covers {command!r}"
        return
    program, *arguments = shlex.split(command)
    known = {"dvla-fast": ["-m", "dvla_fast"], "python": []}
    assert program in known, f"{page}: no test runs {command!r}"
    done = subprocess.run(
        [sys.executable, *known[program], *arguments],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("page", "code"), blocks("python"), ids=lambda value: value[:20])
def test_documented_example(
    page: str, code: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from dvla_fast.rl import rewards

    monkeypatch.chdir(tmp_path)  # where examples leave their files
    monkeypatch.setattr(rewards, "_REWARDS", dict(rewards._REWARDS))  # examples may register some
    exec(compile(code, page, "exec"), {})


def test_make_targets_do_their_own_setup() -> None:
    done = subprocess.run(
        ["make", "-n", "demo", "VENV=.no-such-venv"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    steps = ["-m venv", "pip install", "-e '.[train]'", "dvla-fast demo"]
    positions = [done.stdout.index(step) for step in steps]
    assert positions == sorted(positions)


def test_links_between_pages_exist() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} -> {target}"


def test_what_the_page_for_developers_names_is_there() -> None:
    page = (ROOT / "docs/development.md").read_text()
    folders = ("csrc", "kernels", "dvla_fast", "benchmarks", "tests", "build_tools")
    paths = [name for name in re.findall(r"`([^`\s]+)`", page) if name.split("/")[0] in folders]
    assert len(paths) > 40
    assert [path for path in paths if not (ROOT / path).exists()] == []
