"""Tests of reading.md: it shows the present erdp.py and all of its mathematics, its tests exist, GitHub can read it."""

import ast
import re

import pytest
import reading

PAGE = reading.PAGE.read_text()
SOURCE = reading.CODE.read_text()
BANNER = "The paper's mathematics ends here"
TREE = ast.parse((reading.CODE.parent / "test_erdp.py").read_text())
TESTS = {node.name for node in TREE.body if isinstance(node, ast.FunctionDef)}
ON_THE_PAGE = [*range(1, 9), 10, *range(12, 18), 28, 30, 40]


def test_reading_is_up_to_date():
    assert PAGE == reading.refreshed(PAGE, SOURCE), "reading.md is not of this erdp.py: run python results/reading.py"


def test_reading_makes_again_what_stands_below_a_comment():
    without = re.sub("^(In )?`.+`:\n\n```python\n(.*\n)*?```\n", "", PAGE, flags=re.M)
    without = re.sub(r"(?<=<!-- index -->\n)(\|.*\n)+", "", without)
    assert "```python" not in without and "<br>" not in without
    assert reading.refreshed(without, SOURCE) == PAGE
    other = SOURCE.replace("\ndef lcb(q", "\ndef lcb(values")
    assert reading.refreshed(PAGE, other) == PAGE.replace("\ndef lcb(q", "\ndef lcb(values") != PAGE


def test_reading_has_a_heading_for_every_equation_that_the_code_computes():
    assert [name for name in reading.parts(PAGE) if name.startswith("Eq.")] == [f"Eq. {n}" for n in ON_THE_PAGE]
    named = {int(n) for comment in re.findall("# .*", SOURCE) for n in re.findall(r"Eq\. (\d+)", comment)}
    assert named <= {*ON_THE_PAGE}, "equations that comments of erdp.py name"


@pytest.mark.parametrize("part", reading.parts(PAGE))
def test_reading_names_code_and_tests_that_exist(part):
    text = reading.parts(PAGE)[part]
    assert "$$" in text or part == "Algorithm 1"
    assert reading.codes(text) and reading.tests(text), f"{part} has no code or no test"
    for code in reading.codes(text):
        assert all(reading.lines_of(code, PAGE, SOURCE))
    missing = [name for name in reading.tests(text) if name not in TESTS]
    assert not missing, f"{part} of results/reading.md names {', '.join(missing)}, which test_erdp.py does not have"


def left_out(source: str) -> list[str]:
    """Definitions of the paper's mathematics of which the page does not show every line."""
    lines = source.splitlines()
    (end,) = (n for n, line in enumerate(lines) if BANNER in line)
    shown = {n for code in reading.codes(PAGE) for numbers in reading.lines_of(code, PAGE, source) for n in numbers}
    found = []
    for name, rows in reading.definitions(source).items():
        alias = lines[rows[-1]].startswith(f"{name} = Literal[")  # of a table's names, for the command line
        if rows[-1] < end and not alias and any(lines[n] and n not in shown for n in rows):
            found.append(name)
    return found


def test_reading_leaves_out_nothing_of_the_papers_mathematics():
    assert left_out(SOURCE) == [], "above erdp.py's banner, and not on the page: add a comment to results/reading.md"
    more = SOURCE.replace("\ndef lcb(", "\ndef median(q):\n    return q\n\n\ndef lcb(")
    assert left_out(more) == ["median"], "a function that is new is seen"
    more = SOURCE.replace("    agent.updates += 1\n", "    agent.updates += 1\n    agent.new = 1\n")
    assert left_out(more) == ["update"], "a line of Algorithm 1 that is new is seen"


def test_reading_is_markdown_that_cannot_harm_its_mathematics():
    text = re.sub("^```python\n(.*\n)*?```\n", "", PAGE, flags=re.M)
    blocks = re.findall(r"(?<=\n\n)\$\$\n(.+?)\n\$\$(?=\n\n)", text, re.S)
    assert text.count("$$") == 2 * len(blocks), "a block stands on lines of its own, between empty ones"
    inline = re.findall(r"\$`(.+?)`\$", text)
    assert len(re.findall(r"\$`|`\$", text)) == 2 * len(inline), "mathematics within a line ends on it"
    for maths in blocks + inline:
        assert not re.search(r"\\[^A-Za-z]", maths), f"Markdown would take the backslash of {maths}"
        assert not re.search(r"[<>&*$]|^\s*([-+|#] |\d+[.)] |[-=]+$|$)", maths, re.M), f"Markdown would read {maths}"
        assert maths.count("{") == maths.count("}")
        assert len(re.findall(r"\\left\b", maths)) == len(re.findall(r"\\right\b", maths))
    assert "$" not in re.sub(r"\$\$|\$`|`\$", "", text)
