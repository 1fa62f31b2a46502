"""What the scripts of this folder share in making pages: their arguments, Markdown tables, pictures."""

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


def save(figure, path: Path, dpi: int = 100):
    figure.tight_layout()
    figure.savefig(path, dpi=dpi)
    plt.close(figure)


def draw_band(axis, group, name: str):
    """A group of runs (`runs.Group`) over updates: mean ± deviation over seeds."""
    steps, values = group.curve()
    mean, std = values.mean(0), values.std(0)
    seeds = f"{len(values)} seed" + "s" * (len(values) > 1)
    (line,) = axis.plot(steps, mean, marker=".", label=f"{name} ({seeds})")
    axis.fill_between(steps, mean - std, mean + std, alpha=0.1, color=line.get_color())


def start(parser: argparse.ArgumentParser, argv=None, out: Path | None = RESULTS) -> argparse.Namespace:
    """The arguments of a study, with --out, whose folder is made; ends the program where that cannot be."""
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
