"""What the documents say of the tree is so: contracts, shape suffixes, settings, metrics, paths, links, packages."""

import ast
import re
from pathlib import Path

import pytest

from limaml import schema
from limaml.config import Config, FeatureConfig
from tests.rules.test_repository import ROOT, committed, imported, python_files

CONTRACTS = "docs/contracts.md"
ARCHITECTURE = "docs/architecture.md"
PAGES = [path for path in committed() if path.suffix == ".md" and path.parts[0] in ("README.md", "docs")]
METRICS = {line.split()[0] for line in (ROOT / "tests" / "contracts" / "metric_names.txt").read_text().splitlines()}

# "contract 5", "contracts 3 and 5", "contracts 3 (two ages), 4 (another version) and 6".
_CITED = re.compile(r"\bcontracts? (\d+(?:(?: \([^)]*\))?(?:, and|,| and| or| to) \d+)*)", re.IGNORECASE)
_CONTRACT = re.compile(r"^## Contract (\d+)\. \S", re.MULTILINE)
_TEST = re.compile(r"`(tests/[^`:\s]+)(?:::(\w+))?`")
_SUFFIX = re.compile(r"[a-z0-9]_([A-Z][A-Z0-9]*)$")
_CODE = re.compile(r"```.*?```|`([^`]+)`", re.DOTALL)
_SERIES = re.compile(r"^(limaml_\w+?)(?:_bucket|_count|_sum)?$")


def text_of(path: Path | str) -> str:
    return (ROOT / path).read_text()


def cited(text: str) -> set[int]:
    """Numbers of contracts that a text cites, also over the end of a line (of a comment)."""
    flat = re.sub(r"\s*\n[\s#>*]*", " ", text)
    return {int(number) for found in _CITED.findall(flat) for number in re.findall(r"\d+", re.sub(r"\([^)]*\)", "", found))}


def contracts() -> dict[int, str]:
    """Number -> what stands below its heading."""
    parts = _CONTRACT.split(text_of(CONTRACTS))
    return {int(number): body for number, body in zip(parts[1::2], parts[2::2], strict=True)}


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("as contract 5 forbids", {5}),
        ("(contracts 3 and 5)", {3, 5}),
        ("Contracts 3 (two ages), 4 (another\n# version) and 6 (why)", {3, 4, 6}),
        ("whole weeks, contract\n# 9)", {9}),
        ("Contracts: 5 kept; 3 contracts", set()),
    ],
)
def test_a_citation_is_found(text: str, numbers: set[int]) -> None:
    assert cited(text) == numbers


def test_every_contract_that_is_cited_stands_in_its_document() -> None:
    known = set(contracts())
    assert known == set(range(1, 12))
    kinds = {".py", ".md", ".toml", ".yaml", ".h", ".c"}
    citing = {path: cited(text_of(path)) for path in committed() if path.suffix in kinds and path.name != "test_docs.py"}
    assert not {path: numbers - known for path, numbers in citing.items() if numbers - known}
    assert sum(bool(numbers) for numbers in citing.values()) > 20, "the pattern no longer finds what there is"


def test_the_tests_that_contracts_name_exist() -> None:
    for number, body in contracts().items():
        named = _TEST.findall(body)
        assert named, f"contract {number} names no test"
        for path, function in named:
            assert (ROOT / path).exists(), f"contract {number}: {path}"
            assert not function or re.search(rf"^(async )?def {function}\(", text_of(path), re.MULTILINE), (
                f"contract {number}: {path} has no {function}"
            )


def suffix_letters(path: Path) -> set[str]:
    """Letters of the shape suffixes of a module's names."""
    names = {
        value
        for node in ast.walk(ast.parse(text_of(path)))
        for value in (getattr(node, field, None) for field in ("id", "arg", "attr"))
        if isinstance(value, str)
    }
    return {letter for name in names if (found := _SUFFIX.search(name)) for letter in found[1] if letter.isalpha()}


def test_every_letter_of_a_shape_suffix_stands_in_the_legend() -> None:
    rows = re.findall(r"^\| ([A-Z](?:, [A-Z])*) \| \S", text_of(ARCHITECTURE), re.MULTILINE)
    legend = {letter for row in rows for letter in row.split(", ")}
    used = {path: suffix_letters(path) for path in python_files() if path.parts[0] in ("limaml", "serving")}
    assert not {path: letters - legend for path, letters in used.items() if letters - legend}
    assert legend == set().union(*used.values()), "a letter that no name uses"


def spans(page: Path) -> list[str]:
    """What stands in back-ticks on a page, each on one line."""
    return [" ".join(found.split()) for found in _CODE.findall(text_of(page)) if found]


def unknown_setting(word: str) -> bool:
    """Whether a word reads `section.key` and there is no such setting."""
    section, _, key = word.partition(".")
    if section not in Config.model_fields or not re.fullmatch(r"[a-z_]+", key) or key in ("py", "md", "json", "toml"):
        return False
    return key not in getattr(Config.model_fields[section].annotation, "model_fields", {})


def unknown_metric(word: str) -> bool:
    found = _SERIES.match(word)
    own = ("limaml_train", "limaml_daily", "limaml_rank_", "limaml_")
    return bool(found) and word not in own and word not in METRICS and found[1] not in METRICS


def unknown_path(word: str, page: Path) -> bool:
    """Whether a word reads like a file or folder of the repository and there is none."""
    top = word.split("/")[0]
    if not re.fullmatch(r"[\w./-]+", word) or "/" not in word or not (ROOT / top).is_dir() or top in ("", ".", "..", ".run"):
        return False
    return not (ROOT / word).exists() and not (ROOT / page.parent / word).exists()


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_a_page_names_only_what_there_is(page: Path) -> None:
    wrong = []
    for span in spans(page):
        if "python -m" in span:
            continue
        for word in re.findall(r"[\w./-]*\w", span):
            if unknown_setting(word) or unknown_metric(word) or unknown_path(word, page):
                wrong.append(span)
    assert not wrong


def test_names_in_code_style_occur_in_the_code() -> None:
    """Settings without their section, events of the log, labels, fields: names with an underscore, but those of a formula."""
    kinds = {".py", ".toml", ".c", ".h", ".txt", ".yaml", ".json"}
    code = "\n".join(text_of(path) for path in committed() if path.suffix in kinds and path.parts[0] != "experiments")
    known = set(re.findall(r"\w+", code)) | {path.stem for path in committed()}
    foreign = {"honor_labels", "node_textfile_scrape_error"}
    pages = [page for page in PAGES if page.name != "mathematics.md"]
    named = {word: page for page in pages for span in spans(page) for word in re.findall(r"\b[a-z]\w*_\w*[a-z]\b", span)}
    assert not {word: page for word, page in named.items() if word not in known | foreign}
    assert len(named) > 100


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_a_page_links_only_to_what_there_is(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        target, _, anchor = link.partition("#")
        if link.startswith("http"):
            continue
        found = ROOT / page.parent / target if target else ROOT / page
        assert found.exists(), link
        heads = re.findall(r"^#+ (.+)$", found.read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads], link


def test_the_page_for_other_data_names_every_column_and_what_may_be_declared() -> None:
    page = text_of("docs/bring_your_own_data.md")
    assert not [name for name in schema.EVENTS.names if f"`{name}`" not in page]
    for setting in ("entity", "type", "aggregate", "clock"):
        choices = re.findall(r"'(\w+)'", str(FeatureConfig.model_fields[setting].annotation))
        assert choices
        assert not [choice for choice in choices if choice not in page], setting


def test_modules_that_pages_run_exist() -> None:
    for page in PAGES:
        for module in re.findall(r"python -m (\w+(?:\.\w+)*)", text_of(page)):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), f"{page}: {module}"


def test_a_package_that_only_one_layer_imports_is_imported_nowhere_else() -> None:
    table = text_of(ARCHITECTURE).split("third-party packages that only it imports")[1].split("\n\n")[0]
    rows = [line.split("|")[1:4] for line in table.splitlines() if line.startswith("| `")]
    named = 0
    for layer, _, packages in rows:
        places = tuple(place.removesuffix("/") for place in re.findall(r"`([^`]+)`", layer))
        for package in packages.strip().split(", ") if packages.strip() else ():
            module, named = package.lower().replace(" ", "_"), named + 1
            users = [path for path in python_files() if path.parts[0] in ("limaml", "serving") and module in imported(path)]
            assert users, f"nothing imports {module}"
            assert not [path for path in users if not str(path).startswith(places)], module
    assert named > 5
