"""What the pages say is true as far as a machine can tell: commands parse, files are valid, links lead somewhere."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
import yaml

import smolcluster
from docs import pages
from smolcluster.cli import _run, app
from smolcluster.config.explain import type_at
from smolcluster.config.load import check_file, load_config, preset_names

BY_NAME = {pages.name(page): page for page in pages.PAGES}
LATER_COMMANDS = ("launch",)  # the schema's text on cluster.ssh names it, and the table marks that key as later
every_page = pytest.mark.parametrize("page", BY_NAME.values(), ids=BY_NAME.keys())


def parse(arguments: list[str], *, complete: bool = True) -> dict[str, Any]:
    """The options of a `smolcluster` command line, without running it.

    Args:
        arguments: without the program's name.
        complete: False: only the command is looked for, its options are not.
    """
    command: Any = typer.main.get_command(app)
    context = command.make_context("smolcluster", list(arguments), resilient_parsing=True)
    while hasattr(command, "resolve_command") and arguments:
        wanted = arguments[0]
        _, command, arguments = command.resolve_command(context, arguments)
        assert command is not None, f"no such command: {wanted}"
        is_strict = complete and not hasattr(command, "resolve_command")
        context = command.make_context(command.name, list(arguments), resilient_parsing=not is_strict)
    return dict(context.params)


@every_page
def test_every_command_on_a_page_parses(page: Path) -> None:
    makefile = (pages.ROOT / "Makefile").read_text(encoding="utf-8")
    for program, *arguments in pages.commands(page):
        if program == "make":
            targets = [word for word in arguments if "=" not in word]
            assert all(re.search(rf"^{re.escape(t)}:", makefile, re.MULTILINE) for t in targets), (page, arguments)
        else:
            parse(arguments)
    for _, *arguments in pages.mentions(page):
        if arguments[0] not in LATER_COMMANDS:
            parse(arguments, complete=False)


@every_page
def test_presets_and_keys_of_a_pages_commands_exist(page: Path) -> None:
    shown_to_fail = [session.command for session in pages.sessions(page) if session.output.startswith("error:")]
    for command in pages.commands(page):
        if command[0] != "smolcluster" or command in shown_to_fail or "NAME" in command or "KEY=VALUE" in command:
            continue
        options = parse(command[1:])
        overrides = [text for text in options.get("override") or () if not text.endswith("=FILE")]
        cluster = [pages.ROOT / options["cluster"]] if isinstance(options.get("cluster"), Path) else []
        load_config(options.get("preset"), (), cluster, overrides, {"algorithm": options.get("algorithm")}, {})


def test_the_check_notices_a_command_that_is_not_there() -> None:
    for wrong in (["trian"], ["train", "--loacl", "3"], ["node", "--cluster", "x.yaml"], ["config", "shwo"]):
        with pytest.raises(Exception, match=r"(?i)no such|missing"):
            parse(wrong)


@every_page
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for target in pages.links(page):
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), f"{pages.name(page)} links to {target}"
        assert pages.ROOT in file.parents, f"{pages.name(page)} links out of the repository: {target}"
        if anchor:
            assert anchor in pages.anchors(file), f"{pages.name(page)} links to {target}"


@every_page
def test_every_yaml_block_passes_config_check(page: Path, tmp_path: Path) -> None:
    for number, block in enumerate(pages.blocks(page, "yaml")):
        file = tmp_path / f"block{number}.yaml"
        file.write_text(block.text, encoding="utf-8")
        report = check_file(file)
        assert report.errors == report.warnings == (), f"{pages.name(page)}:\n{block.text}"


@every_page
def test_json_and_python_blocks_are_valid(page: Path) -> None:
    for block in pages.blocks(page, "json"):
        assert isinstance(json.loads(block.text), dict)
    for block in pages.blocks(page, "python"):
        compile(block.text, pages.name(page), "exec")
        assert set(re.findall(r"\bsmol\.(\w+)", block.text)) <= set(smolcluster.__all__)


SHOWN = [
    session
    for page in pages.PAGES
    for session in pages.sessions(page)
    if session.command[0] == "smolcluster" and (session.command[1] == "config" or session.output.startswith("error:"))
]


@pytest.mark.parametrize("session", SHOWN, ids=lambda s: " ".join(s.command[1:4]))
def test_what_a_page_shows_is_what_the_command_prints(
    session: pages.Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "examples").mkdir()
    for example in (pages.ROOT / "examples").glob("*.yaml"):
        (tmp_path / "examples" / example.name).write_text(example.read_text(encoding="utf-8"), encoding="utf-8")
    for other in pages.sessions(session.page):
        if other.command[0] == "cat":
            (tmp_path / other.command[1]).write_text(other.output, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for variable in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    code = _run(session.command[1:], "smolcluster")
    printed = "".join(capsys.readouterr())
    assert code == (2 if "error:" in session.output else 0)
    rest = printed.splitlines()
    for expected in session.output.splitlines():
        if expected == "...":
            continue
        assert expected in rest, f"{expected!r} is not in, or out of order in:\n{printed}"
        rest = rest[rest.index(expected) + 1 :]
    if "..." not in session.output.splitlines():
        assert printed == session.output


def test_all_presets_are_on_the_page_that_lists_them() -> None:
    shown = [s for s in SHOWN if s.command == ["smolcluster", "config", "list"]]
    assert [line.split()[0] for line in shown[0].output.splitlines()] == preset_names()


def test_the_readmes_cluster_file_is_the_example() -> None:
    example = yaml.safe_load((pages.ROOT / "examples" / "cluster_three_terminals.yaml").read_text(encoding="utf-8"))
    for page in (BY_NAME["README.md"], BY_NAME["docs/getting-started.md"]):
        assert example in [yaml.safe_load(block.text) for block in pages.blocks(page, "yaml")], pages.name(page)


def generator(name: str = "generate_configuration") -> ModuleType:
    """A script of docs/, as a module."""
    spec = importlib.util.spec_from_file_location(name, pages.ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_keys_is_what_the_schema_says() -> None:
    text = BY_NAME["docs/configuration.md"].read_text(encoding="utf-8")
    assert generator().page(text) == text, "run: python docs/generate_configuration.py"


def test_the_api_is_what_the_server_says() -> None:
    pytest.importorskip("fastapi", reason="needs the extra serve")
    pytest.importorskip("prometheus_client", reason="needs the extra serve")
    text = BY_NAME["docs/api.md"].read_text(encoding="utf-8")
    assert generator("generate_api").page(text) == text, "run: python docs/generate_api.py"


def test_every_key_that_is_marked_as_later_exists() -> None:
    for key in generator().LATER:
        assert type_at(key.split(".")) is not None, key


def test_every_page_of_docs_is_in_the_navigation_and_no_font_is_fetched() -> None:
    settings = yaml.safe_load((pages.ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = set(_leaves(settings["nav"]))
    assert listed == {page.relative_to(pages.ROOT / "docs").as_posix() for page in (pages.ROOT / "docs").rglob("*.md")}
    assert settings["theme"]["font"] is False


def _leaves(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    items = nav.values() if isinstance(nav, dict) else nav
    return [leaf for item in items for leaf in _leaves(item)]


def test_measured_equality_is_within_what_the_readme_says() -> None:
    rows = re.findall(r"^\| (float\d\d), (losses|weights) \|.*\| ([\d.]+) . 10⁻(\S+) \|$", _readme(), re.MULTILINE)
    bounds = {
        (precision, quantity): float(f"{factor}e-{exponent.translate(str.maketrans('⁰¹²³⁴⁵⁶⁷⁸⁹', '0123456789'))}")
        for precision, quantity, factor, exponent in rows
    }
    assert len(bounds) == 4
    results = json.loads((pages.ROOT / "benchmarks" / "results" / "equality.json").read_text(encoding="utf-8"))
    for run in results["runs"]:
        precision = run["precision"].replace("fp", "float")
        assert run["apart"]["loss"] < bounds[precision, "losses"], run
        assert run["apart"]["weights"] < bounds[precision, "weights"], run


def _readme() -> str:
    return BY_NAME["README.md"].read_text(encoding="utf-8")
