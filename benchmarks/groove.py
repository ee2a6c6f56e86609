"""A data set whose train_master says which performance each clip is of.

    python benchmarks/groove.py SOURCE DESTINATION
    python train.py DATA_DIR=DESTINATION NUM_CLASSES=auto ...

SOURCE is in the competition's layout and has a provenance.tsv with the columns file_name and
performance. DESTINATION is a copy of it, its train_master with the performances as the column
group: clips of one stay on one side of the validation split.
"""

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import pandas as pd

from stemgenre import cli
from stemgenre.data.find_files import find_master
from stemgenre.data.tables import read_master
from stemgenre.errors import UserError

COLUMNS = ("file_name", "label_id")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("destination", type=Path, metavar="DESTINATION")
    options = parser.parse_args()
    train = copy_with_groups(options.source, options.destination)
    cli.log.info("%d clips of %d performances", len(train), train["group"].nunique())


def copy_with_groups(source: Path, destination: Path) -> pd.DataFrame:
    """Copies the data set; returns its train_master, which has the column group now.

    Raises UserError if DESTINATION exists, or SOURCE lacks a table or a clip's performance.
    """
    if destination.exists():
        raise UserError(f"{destination} exists; name a folder that does not")
    train_master = find_master(source, "train_master") if source.is_dir() else None
    provenance = find_master(source, "provenance") if source.is_dir() else None
    if not train_master or not provenance:
        raise UserError(f"{source} is no folder with a train_master and a provenance.tsv")
    performances = read_master(provenance, ("file_name", "performance"))
    train = read_master(train_master, COLUMNS)
    train["group"] = train["file_name"].map(performances.set_index("file_name")["performance"])
    if train["group"].isna().any():
        missing = train["file_name"][train["group"].isna()].iloc[0]
        raise UserError(f"{provenance} lacks the performance of {missing}")
    destination.mkdir(parents=True)
    for path in source.rglob("*"):  # contents alone: what is copied may be read-only
        copy = destination / path.relative_to(source)
        if path.is_dir():
            copy.mkdir(exist_ok=True, parents=True)
        elif path != train_master:
            copy.parent.mkdir(exist_ok=True, parents=True)
            shutil.copyfile(path, copy)
    train.to_csv(destination / "train_master.tsv", sep="\t", index=False)
    return train


if __name__ == "__main__":
    cli.run_script(main)
