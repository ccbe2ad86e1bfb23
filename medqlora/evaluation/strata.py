"""The strata of a predictions file: groups of rows that have one value in a column."""

from __future__ import annotations

from medqlora.data.reading import STRATA
from medqlora.evaluation.predictions import PredictionError, Predictions

# The stratum of the rows that have no value in a column.
NO_VALUE = "(none)"


def list_strata(rows: Predictions, column: str) -> list[str]:
    """Return the value of each row in a column, or NO_VALUE.

    Args:
        rows: answers to questions.
        column: a column of the data file that the rows keep, or one of STRATA.

    Raises:
        PredictionError: no row has the column, it can be read in two ways, or the rows are texts.
    """
    if rows.kind == "text":
        raise PredictionError(
            f"{rows.path}: --by {column} is for answers to questions, got rows of kind text; leave"
            " it out"
        )
    own = [name for name in STRATA if any(rows.columns[name])]
    if column in rows.kept and column in own:
        raise PredictionError(
            f"{rows.path}: --by {column} can be read in two ways: rows have a {column} of their own"
            " and one that they keep of the data file; take the second out of the rows"
        )
    if column in rows.kept:
        values = [rows.kept[column].get(i) for i in range(len(rows))]
    elif column in own:
        values = rows.columns[column]
    else:
        raise PredictionError(
            f"{rows.path}: --by {column}: no row has this column; there are"
            f" {', '.join([*own, *rows.kept]) or 'none'}; eval/predict.py --keep keeps columns of"
            " the data"
        )
    if NO_VALUE in values and None in values:
        raise PredictionError(
            f"{rows.path}: --by {column}: {NO_VALUE} stands for rows without a value and is also a"
            " value of the file; write it otherwise there"
        )
    return [value or NO_VALUE for value in values]
