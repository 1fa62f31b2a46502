"""What the scripts of this folder share in making pages: their arguments, tables, pictures, and the pages' text."""

import argparse
import sys
from pathlib import Path

import torch
from matplotlib import pyplot as plt

RESULTS = Path(__file__).resolve().parent
ROOT = RESULTS.parent
sys.path.insert(0, str(ROOT))  # so that the scripts find erdp.py
plt.switch_backend("Agg")


def table(header, rows) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [header, ["---"] * len(header), *rows])


def fill(page: str, out: Path, bare: bool = False, **made: str):
    """Writes out/page: the text of that page here, with the paragraph or table below each `<!-- name -->` made anew.

    `bare` keeps of that text the headings and pictures alone, for other runs than those of which the rest speaks.
    """
    text = (RESULTS / page).read_text()
    if bare:
        title, *blocks = (block for block in text.split("\n\n") if block.startswith(("#", "<!-- ", "![")))
        text = "\n\n".join([title, f"`results/{page}` says what the columns mean.", *blocks, ""])
    for name, paragraph in made.items():
        before, marker, after = text.partition(f"<!-- {name} -->\n")
        assert marker, f"{page} has no place <!-- {name} -->"
        _, _, rest = after.partition("\n\n")
        text = f"{before}{marker}{paragraph}\n\n{rest}"
    (out / page).write_text(text.rstrip("\n") + "\n")


def save(figure, path: Path, dpi: int = 100):
    figure.tight_layout()
    figure.savefig(path, dpi=dpi)
    plt.close(figure)


def start(parser: argparse.ArgumentParser, argv=None, out: Path | None = RESULTS) -> argparse.Namespace:
    """The arguments of a script, with --out, whose folder is made; one thread. Mistakes are one line and status 2."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, default=out, help="the folder to write to")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}: see --help\n")
    args = parser.parse_args(argv)
    try:
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {args.out} cannot be made a folder ({error.strerror})")
    torch.set_num_threads(1)
    return args
