"""Tests of the documentation: every command and Python block is parsed or run, as it is marked.

See tests/helpers/docs_pages.py for the markers.
"""

import contextlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import pytest
from sklearn.datasets import load_sample_images

from mixer_jax.checkpoints.resolve import METADATA_SUFFIX
from mixer_jax.errors import UserError
from mixer_jax.models.mixer_config import MixerConfig
from tests.helpers.cli_session import CliResult
from tests.helpers.docs_commands import (
    check_command,
    check_names,
    check_python,
    mixer_arguments,
    shorten,
    split_command,
    without_variables,
)
from tests.helpers.docs_pages import Block, read_blocks
from tests.helpers.docs_session import Item, run_items
from tests.helpers.random_weights import random_weights, save_npz

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (
        *(
            ROOT / name
            for name in ("README.md", "BENCHMARKS.md", "CONTRIBUTING.md", "launch/README.md")
        ),
        *(ROOT / "docs").rglob("*.md"),
    )
)
# The checkpoint that pages call runs/digits, unless they train it.
DIGITS = "runs/digits"
Results = dict[str, list[tuple[Block, str, CliResult | None]]]


def make_folder(folder: Path, files: Path, page: str) -> None:
    """Makes the folder of a page, with files for its commands: photographs, configs, weights."""
    (folder / "runs").mkdir(parents=True)
    for name in ("photos", "photo.jpg", "Mixer-B_16.npz"):
        (folder / name).symlink_to(files / name)
    for name in ("configs", "launch", "docs"):
        (folder / name).symlink_to(ROOT / name)
    for block in read_blocks(Path(page)):
        if block.mode == "file":
            path = folder / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that pages name: photographs in two classes, and weights in Google's format."""
    files = tmp_path_factory.mktemp("files")
    for name, photograph in zip(("cat", "dog"), load_sample_images().images, strict=True):
        folder = files / "photos" / name
        folder.mkdir(parents=True)
        for index in range(1, 11):
            top, left = 20 * index, 30 * index
            crop = photograph[top : top + 220, left : left + 300, ::-1]
            assert cv2.imwrite(str(folder / f"{index}.jpg"), crop)
    (files / "photo.jpg").write_bytes((files / "photos" / "cat" / "1.jpg").read_bytes())
    config = MixerConfig(1, 32, 16, 8, 16)
    weights = random_weights(config, (224, 224), class_names=(), num_classes=1000)
    Path(save_npz(weights, files / "Mixer-B_16.npz") + METADATA_SUFFIX).unlink()
    return files


def make_items(block: Block, folder: Path) -> list[Item]:
    """Returns the program of a block."""
    if not block.is_shell:
        return [Item(str(folder), "python", block.text, block.code)]
    items = []
    for line in block.commands():
        commands = split_command(line)
        if len(commands) == 1 and mixer_arguments(commands[0]) and not re.search("[|<>]", line):
            with contextlib.chdir(folder):
                arguments = shorten(commands[0], block.extra)
            variables = commands[0][: len(commands[0]) - len(without_variables(commands[0]))]
            if variables:
                # JAX reads them when it starts, so the command needs a process of its own.
                line = f"{' '.join(variables)} {shlex.join(arguments)}"
                items.append(Item(str(folder), "shell", line, block.code))
            else:
                items.append(Item(str(folder), "command", arguments, block.code))
        else:
            items.append(Item(str(folder), "shell", line, block.code))
    return items


def run_pages(modes: tuple[str, ...], folder: Path, files: Path, data_dir: str) -> Results:
    """Runs the blocks of these modes, on all pages that have one of the last mode.

    Returns:
        Block, line and result of everything that ran, for each page.
    """
    pages = {page: read_blocks(Path(page)) for page in PAGES}
    digits = shorten(["mixer-jax", "train", "--config=digits"])
    items = [Item(str(files), "command", digits)]
    sources: list[tuple[str, Block]] = []
    for page, blocks in pages.items():
        marked = [block for block in blocks if block.mode in modes]
        if not any(block.mode == modes[-1] for block in marked):
            continue
        page_folder = folder / re.sub(r"\W+", "_", page)
        make_folder(page_folder, files, page)
        own = [item for block in marked for item in make_items(block, page_folder)]
        if not any(trains_digits(item) for item in own):
            (page_folder / DIGITS).symlink_to(files / DIGITS)
        items += own
        sources += [(page, block) for block in marked for _ in make_items(block, page_folder)]
    results: Results = {page: [] for page in pages}
    if not sources:
        return results
    first, *rest = run_items(items, data_dir)
    assert first is not None
    assert first.code == 0, first.err
    for (page, block), item, result in zip(sources, items[1:], rest, strict=True):
        results[page].append((block, str(item.content), result))
    return results


def trains_digits(item: Item) -> bool:
    """Returns whether a command trains in runs/digits."""
    if item.language != "command" or item.content[2] != "mixer_jax.main":
        return False
    workdirs = [word for word in item.content if word.startswith("--workdir=")]
    own = {"--config=digits", "--config=configs/digits.py"} & {*item.content}
    return workdirs == [f"--workdir={DIGITS}"] or (not workdirs and bool(own))


@pytest.fixture(scope="module")
def fast_results(tmp_path_factory: pytest.TempPathFactory, files: Path, digits_dir: str) -> Results:
    """Results of the blocks that the fast tests run."""
    return run_pages(("run",), tmp_path_factory.mktemp("fast"), files, digits_dir)


@pytest.fixture(scope="module")
def slow_results(tmp_path_factory: pytest.TempPathFactory, files: Path, digits_dir: str) -> Results:
    """Results of the pages with blocks that only the slow tests run."""
    return run_pages(("run", "slow"), tmp_path_factory.mktemp("slow"), files, digits_dir)


def check_results(page: str, results: Results, modes: tuple[str, ...]) -> None:
    """Checks exit codes, and the output that a page shows."""
    for block, line, result in results[page]:
        assert result is not None, f"{block.place}: not run, since an earlier block failed"
        assert result.code == block.code, f"{block.place}: {line}\n{result.out}{result.err}"
    outputs: dict[str, str] = {}
    for block, _, result in results[page]:
        assert result is not None
        outputs[block.place] = outputs.get(block.place, "") + result.out + result.err
    for before, block in pairs(read_blocks(Path(page))):
        if block.mode == "output" and before.mode in modes and results[page]:
            check_output(block, outputs[before.place])


def pairs(blocks: list[Block]) -> Iterator[tuple[Block, Block]]:
    """Yields each block with the last block before it that is not output."""
    before = None
    for block in blocks:
        if before is not None:
            yield before, block
        if block.mode != "output":
            before = block


def check_output(block: Block, output: str) -> None:
    """Checks that the lines of a block occur in an output, in order; "…" matches any lines."""
    rest = [line.strip() for line in output.splitlines()]
    for line in map(str.strip, block.text.splitlines()):
        if line and line != "…":
            assert line in rest, f"{block.place}: {line!r} is not in the output\n{output}"
            rest = rest[rest.index(line) + 1 :]


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_accepted(page: str, files: Path, tmp_path: Path) -> None:
    make_folder(tmp_path / "page", files, str(ROOT / page))
    (tmp_path / "page" / DIGITS).symlink_to(files / DIGITS)
    for block in read_blocks(ROOT / page):
        lines = block.commands() if block.is_shell else []
        for command in [command for line in lines for command in split_command(line)]:
            place = f"{block.place}: {' '.join(command)}"
            expected: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
            if block.code == 2:
                # Commands that run may also be refused later, for example because data is missing.
                is_parsed = block.mode == "parse"
                expected = pytest.raises(UserError) if is_parsed else contextlib.suppress(UserError)
            try:
                with contextlib.chdir(tmp_path / "page"), expected:
                    check_command(command)
            except UserError as error:
                pytest.fail(f"{place}\n{error}")
            except AssertionError as error:
                pytest.fail(f"{place}\n{error}")


@pytest.mark.parametrize("page", PAGES)
def test_python_names_exist(page: str) -> None:
    for block in read_blocks(ROOT / page):
        if block.is_python:
            try:
                check_python(block.text)
            except (AssertionError, SyntaxError, ImportError) as error:
                pytest.fail(f"{block.place}\n{error}")


@pytest.mark.parametrize("page", PAGES)
def test_names_and_links_in_the_text_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    check_names(text)
    prose = re.sub(r"^\s*```.*?^\s*```", "", text, flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\((?!https?:|mailto:|#)([^)\s]+)", prose):
        assert (ROOT / page).parent.joinpath(link.partition("#")[0]).exists(), link


@pytest.mark.parametrize("page", PAGES)
def test_blocks_run(page: str, fast_results: Results) -> None:
    check_results(page, fast_results, ("run",))


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_slow_blocks_run(page: str, slow_results: Results) -> None:
    check_results(page, slow_results, ("run", "slow"))


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("python -m mixer_jax.main --config=digits --config.bach_size=8", "bach_size"),
        ("mixer-jax predict --checkpoint=runs/digits --top_k=3 photo.jpg", "--top_k"),
        ("mixer-jax train --config=configs/digit.py", "digits"),
        ("mixer-jax benchmark --mode=trian", "trian"),
        ("launch/local_multiprocess.sh 2 --config=digits --config.mesh.fdsp=2", "fdsp"),
        (
            "launch/tpu_vm.sh --name=a --type=v6e-8 --zone=us-b2-a -- --config=digit --workdir=gs://b/r",
            "digits",
        ),
        ("sbatch launch/slurm.sbatch --config=digits --workdirs=runs/a", "--workdirs"),
    ],
)
def test_wrong_commands_fail(command: str, name: str) -> None:
    with pytest.raises(UserError) as error:
        check_command(*split_command(command))
    assert name in str(error.value)


@pytest.mark.parametrize(
    "command",
    [
        "python docs/no_script.py",
        "mixer-jax-train --config=digits",
        "pip install 'mixer-jax[gpu]'",
        "pip install -r requirements-gpu.txt",
        "python -m mixer_jax.training --config=digits",
        "launch/tpu_vms.sh --name=a",
        "launch/setup_host.sh --accelerators=tpu",
    ],
)
def test_wrong_names_fail(command: str) -> None:
    with pytest.raises(AssertionError):
        check_command(*split_command(command))


@pytest.mark.parametrize(
    "code",
    [
        "import mixer_jax.no_module",
        "from mixer_jax import no_name",
        "import mixer_jax\nmixer_jax.no()",
    ],
)
def test_wrong_python_fails(code: str) -> None:
    with pytest.raises((AssertionError, ImportError)):
        check_python(code)


@pytest.mark.parametrize(
    "text",
    [
        "<!-- test: fast -->\n```\nmixer-jax\n```\n",
        "<!-- test: run -->\nText.\n",
        "<!-- test: run -->\n```json\n{}\n```\n",
        "<!-- test: file -->\n```\ntext\n```\n",
        "```\nmixer-jax\n",
    ],
)
def test_wrong_markers_fail(text: str, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(text)
    with pytest.raises(ValueError, match=r"page\.md"):
        read_blocks(tmp_path / "page.md")


def test_markers_and_fences_are_read(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(
        "1. Run:\n\n"
        "    <!-- test: slow code=1 with=\"--seed=1 --a='b c'\" -->\n"
        "    ```console\n    $ mixer-jax a \\\n        --b\n    output\n    $ ls | wc\n    ```\n\n"
        "```python title='x'\nx = 1\n```\n"
    )
    shell, python = read_blocks(tmp_path / "page.md")
    assert (shell.mode, shell.code, shell.extra) == ("slow", 1, ("--seed=1", "--a=b c"))
    first, second = map(split_command, shell.commands())
    assert first == [["mixer-jax", "a", "--b"]]
    assert second == [["ls"], ["wc"]]
    assert (python.mode, python.text) == ("run", "x = 1\n")
    assert python.place.endswith("page.md:11")


def test_variables_of_commands_reach_them(tmp_path: Path) -> None:
    text = "JAX_NUM_CPU_DEVICES=8 mixer-jax train --config=digits\n"
    (item,) = make_items(Block("page.md:1", "bash", text, "slow"), tmp_path)
    assert item.language == "shell"
    assert item.content.startswith("JAX_NUM_CPU_DEVICES=8 python -m mixer_jax.main --config=digits")
    assert "--config.num_steps=4" in item.content
