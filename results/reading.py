"""Refreshes in reading.md what is taken from erdp.py. All the rest of that page is written by hand, there.

    python results/reading.py    # after a change of erdp.py or of the page

Comments of the page say what stands below them. A new one gets its block or table when the script is run.

    <!-- code: NAME, NAME -->             a block of whole definitions; of a class without the methods that are
                                          named elsewhere on the page, as MeanRevertingSDE.score
    <!-- code: NAME | FIRST | LAST -->    the lines of a definition from the one that contains FIRST to the one that
                                          contains LAST
    <!-- index -->                        a table: of each heading with code its bold words, its code, and the tests
                                          that its text names

In mathematics no backslash may stand before punctuation, and no line may look like a list or a heading, so that
Markdown leaves it alone.
"""

import ast
import functools
import re
import textwrap
from pathlib import Path

RESULTS = Path(__file__).resolve().parent
PAGE = RESULTS / "reading.md"
CODE = RESULTS.parent / "erdp.py"


@functools.cache
def definitions(source: str) -> dict[str, range]:
    """The lines, from 0, of every function, class, method and constant, with the comments right above it."""
    lines, found = source.splitlines(), {}

    def add(name, node):
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
        while re.match("# (?![=#])", lines[first - 1]):
            first -= 1
        found[name] = range(first, node.end_lineno)

    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            add(node.name, node)
        if isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    add(f"{node.name}.{method.name}", method)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            add(node.targets[0].id, node)
    return found


def codes(text: str) -> list[str]:
    """What stands behind `code:` in the comments of a text."""
    return re.findall("^<!-- code: (.+) -->$", text, re.M)


def names(code: str) -> list[str]:
    """The definitions that such a comment names."""
    return code.split(" | ")[0].split(", ")


def tests(text: str) -> list[str]:
    return re.findall(r"`(test_\w+)`", text)


def parts(page: str) -> dict[str, str]:
    """What stands below each heading that has code and tests: each equation, Algorithm 1, and so on."""
    return dict(re.findall(r"^### ([^\n]+)\n(.*?)(?=^##|\Z)", page, re.M | re.S))


def lines_of(code: str, page: str, source: str) -> list[list[int]]:
    """The lines of erdp.py, from 0, that a comment stands for, definition by definition. Raises ValueError where
    erdp.py does not have them."""
    mend = f"change `code: {code}` in results/reading.md"
    _, *marks = code.split(" | ")
    lines, found, shown = source.splitlines(), definitions(source), []
    for name in names(code):
        if name not in found:
            raise ValueError(f"erdp.py has no {name}: {mend}")
        methods = [n for other in codes(page) for n in names(other) if n.startswith(f"{name}.")]
        elsewhere = {n for method in methods for n in found.get(method, ())}
        shown.append([n for n in found[name] if n not in elsewhere])
    if marks:
        ends = [[n for n in shown[0] if mark in lines[n]] for mark in marks]
        if [len(end) for end in ends] != [1, 1]:
            raise ValueError(f"{name} of erdp.py has not one line for each of {marks}: {mend}")
        (first,), (last,) = ends
        shown = [range(first, last + 1)]
    return shown


def block(code: str, page: str, source: str) -> str:
    """The code that a comment stands for, below the names of its definitions."""
    lines, pieces = source.splitlines(), []
    for numbers in lines_of(code, page, source):
        piece = textwrap.dedent("\n".join(lines[n] for n in numbers)).strip()
        pieces.append(re.sub(r"\n{3,}", "\n\n", piece))
    space = "\n\n\n" if any("\n\n" in piece for piece in pieces) else "\n\n"
    title = ", ".join(f"`{name}`" for name in names(code))
    if " | " in code:
        title = f"In {title}"
    return f"{title}:\n\n```python\n{space.join(pieces)}\n```\n"


def index(page: str) -> str:
    """The table equation -> function -> test."""

    def cell(found):
        return "<br>".join(f"`{name}`" for name in dict.fromkeys(found))

    rows = ["| paper | in `erdp.py` | in `test_erdp.py` |", "| --- | --- | --- |"]
    for heading, text in parts(page).items():
        anchor = re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        words = re.search(r"^\*\*(.+)\.\*\*$", text, re.M)[1]
        functions = [name.replace("MeanRevertingSDE.", ".") for code in codes(text) for name in names(code)]
        rows.append(f"| [{heading}](#{anchor}): {words} | {cell(functions)} | {cell(tests(text))} |")
    return "\n".join(rows) + "\n"


def refreshed(page: str, source: str) -> str:
    """The page, with the code of `source` below its comments, and with its index."""
    old_table, old_block = r"(?:\|.*\n)*", r"(?:.*`:\n\n```python\n(?:.*\n)*?```\n)?"
    page = re.sub(f"(^<!-- index -->\n){old_table}", lambda found: found[1] + index(page), page, flags=re.M)
    comment = "(^<!-- code: (.+) -->\n)"
    return re.sub(comment + old_block, lambda found: found[1] + block(found[2], page, source), page, flags=re.M)


def main():
    PAGE.write_text(refreshed(PAGE.read_text(), CODE.read_text()))


if __name__ == "__main__":
    main()
