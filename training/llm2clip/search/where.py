"""Conditions on the rows of an index: one small grammar for all stores, so that they give equal answers.

A condition compares columns to values: `=`, `!=`, `<>`, `<`, `<=`, `>`, `>=`, `IN (...)`, `LIKE`, `IS NULL`, a column
of truth values alone, and `AND`, `OR`, `NOT` and parentheses between them. Values are strings in single quotes,
numbers, `true` and `false`; dates and times are strings. As in SQL, a comparison with a missing value is neither true
nor false. `LIKE` minds upper and lower case, and `%` and `_` cannot be escaped. Strings are ordered by code points.

sqlglot (30.31) would not replace this parser: it takes more spellings (`==`, `~~`, `!is_new`, `IN [1]`, `size = 1;`),
refuses columns that are named like a word of SQL (`from`, `case`), and calls itself for each `NOT` and parenthesis.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import pyarrow as pa

TOKEN = re.compile(
    r"""(?P<string>'(?:[^']|'')*')|"(?P<quoted>(?:[^"]|"")+)"|(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)"""
    r"""|(?P<word>[^\W\d]\w*)|(?P<sign><=|>=|<>|!=|[=<>(),])"""
)
KEYWORDS = {"AND", "OR", "NOT", "IN", "LIKE", "IS", "NULL", "TRUE", "FALSE"}
NEGATED = {"=": "<>", "<>": "=", "<": ">=", ">=": "<", ">": "<=", "<=": ">"}
NOT = {False: "", True: "NOT "}
# Planners are slow, or give up, beyond these.
MAX_DEPTH, MAX_VALUES = 10, 1000
FAMILIES = (
    ("strings", (pa.types.is_string, pa.types.is_large_string)),
    ("numbers", (pa.types.is_integer, pa.types.is_floating)),
    ("true and false", (pa.types.is_boolean,)),
    ("dates", (pa.types.is_date,)),
    ("times", (pa.types.is_timestamp,)),
)


class WhereError(ValueError):
    """A text is no condition on the columns of an index."""


def parse_where(text: str, columns: Mapping[str, pa.DataType], conditions: Conditions) -> Any:
    """Parse a condition.

    Args:
        columns: The columns that it may name, with their types.
        conditions: Makes what a store needs of its parts.

    Raises:
        WhereError: It is no condition on these columns; the message says why, and lists them.
    """
    try:
        return _Parser(text, columns, conditions).parse()
    except ValueError as error:
        names = ", ".join(columns)
        raise WhereError(f"where is {text!r}, which is no condition on the columns {names}: {error}.") from None


class Conditions:
    """The parts of a condition in SQL, with the values in it quoted; stores override what they have in another way.

    NOT is no part: it is moved into the comparisons, since planners understand it badly where it is nested.
    """

    def column(self, name: str) -> str:
        """Quote the name of a column."""
        raise NotImplementedError

    def value(self, value: pa.Scalar) -> str:
        """Write a value."""
        raise NotImplementedError

    def all_or_one(self, operator: str, parts: Sequence[Any]) -> Any:
        """Join conditions of which all (`AND`) or one (`OR`) are fulfilled."""
        return f" {operator} ".join(f"({part})" for part in parts)

    def compared(self, column: str, operator: str, value: pa.Scalar) -> Any:
        """Compare a column with a value of its type by one of `=`, `<>`, `<`, `<=`, `>`, `>=`."""
        return f"{self.column(column)} {operator} {self.value(value)}"

    def one_of(self, column: str, negation: str, values: Sequence[pa.Scalar]) -> Any:
        """Find a value among several; `negation` is `NOT` and a blank, or empty."""
        return f"{self.column(column)} {negation}IN ({', '.join(map(self.value, values))})"

    def like(self, column: str, negation: str, pattern: str) -> Any:
        """Match a pattern, in which `%` is any text, `_` any character, and a backslash itself."""
        raise NotImplementedError

    def is_null(self, column: str, negation: str) -> Any:
        """Find missing values."""
        return f"{self.column(column)} IS {negation}NULL"


class _Parser:
    def __init__(self, text: str, columns: Mapping[str, pa.DataType], conditions: Conditions) -> None:
        self.columns, self.conditions = columns, conditions
        self.tokens: list[tuple[str, str]] = []
        self.position = self.values = start = 0
        while rest := text[start:].lstrip():
            start = len(text) - len(rest)
            match = TOKEN.match(text, start)
            if match is None or match.lastgroup is None:
                raise ValueError(f"{rest[:20]!r} is no column, value or comparison")
            kind, token, start = match.lastgroup, match[match.lastgroup], match.end()
            if kind == "word" and token.upper() in KEYWORDS:
                kind, token = "keyword", token.upper()
            self.tokens.append((kind, token))
        self.tokens.append(("end", "its end"))

    @property
    def _token(self) -> tuple[str, str]:
        """Kind and text of the token that is read next."""
        return self.tokens[self.position]

    def parse(self) -> Any:
        condition = self._any_of(False, 0)
        if self._token[0] != "end":
            self._fail("AND, OR or its end")
        return condition

    def _any_of(self, is_negated: bool, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ValueError(f"parentheses and NOT are nested more than {MAX_DEPTH} deep")
        operand = partial(self._operand, is_negated, depth)
        return self._joined("OR", partial(self._joined, "AND", operand, is_negated), is_negated)

    def _joined(self, operator: str, read: Callable[[], Any], is_negated: bool) -> Any:
        parts = [read()]
        while self._accept(operator):
            parts.append(read())
        written = operator if not is_negated else "AND" if operator == "OR" else "OR"
        return parts[0] if len(parts) == 1 else self.conditions.all_or_one(written, parts)

    def _operand(self, is_negated: bool, depth: int) -> Any:
        while self._accept("NOT"):
            is_negated = not is_negated
        if not self._accept("("):
            return self._comparison(is_negated)
        condition = self._any_of(is_negated, depth + 1)
        self._require(")")
        return condition

    def _comparison(self, is_negated: bool) -> Any:
        column = self._column()
        if self._accept("IS"):
            is_negated ^= self._accept("NOT")
            self._require("NULL")
            return self.conditions.is_null(column, NOT[is_negated])
        if self._accept("NOT"):
            is_negated = not is_negated
            if self._token[1] not in ("IN", "LIKE"):
                self._fail("IN or LIKE")
        if self._accept("IN"):
            self._require("(")
            values = [self._value(column)]
            while self._accept(","):
                values.append(self._value(column))
            self._require(")")
            return self.conditions.one_of(column, NOT[is_negated], values)
        if self._accept("LIKE"):
            if self._family(column) != "strings":
                raise ValueError(f"{column} holds {self._family(column)}, and LIKE compares strings")
            return self.conditions.like(column, NOT[is_negated], self._value(column).as_py())
        return self._compared(column, is_negated)

    def _compared(self, column: str, is_negated: bool) -> Any:
        kind, sign = self._token
        is_truth = self._family(column) == "true and false"
        if kind != "sign" or sign in "(),":
            if not is_truth:
                self._fail("a comparison, such as =")
            return self.conditions.compared(column, "=", pa.scalar(not is_negated))
        self.position += 1
        sign = "<>" if sign == "!=" else sign
        if is_truth and sign not in ("=", "<>"):
            raise ValueError(f"{column} holds true and false, which have no order")
        return self.conditions.compared(column, NEGATED[sign] if is_negated else sign, self._value(column))

    def _column(self) -> str:
        kind, name = self._token
        if kind not in ("word", "quoted"):
            self._fail("a column")
        self.position += 1
        name = name.replace('""', '"')
        if name not in self.columns:
            raise ValueError(f"there is no column {name}")
        return name

    def _value(self, column: str) -> pa.Scalar:
        """Read a value, as one of the type of a column."""
        kind, token = self._token
        type_, family = self.columns[column], self._family(column)
        fits = {"string": ("strings", "dates", "times"), "number": ("numbers",)}.get(kind, ("true and false",))
        if kind not in ("string", "number") and token not in ("TRUE", "FALSE"):
            quotes = " (strings are in single quotes)" if kind in ("word", "quoted") else ""
            self._fail("a value", " (for missing values, write IS NULL)" if token == "NULL" else quotes)
        if family not in fits:
            raise ValueError(f"{column} holds {family}, and {token} is none")
        self.position += 1
        self.values += 1
        if self.values > MAX_VALUES:
            raise ValueError(f"it has more than {MAX_VALUES} values")
        text = token[1:-1].replace("''", "'")
        try:
            if family == "strings":
                return pa.scalar(text)
            if family == "true and false":
                return pa.scalar(token == "TRUE")
            if family == "numbers":
                return _number(token, type_)
            if family == "times" and type_.tz is not None and not re.search(r"(?:Z|[+-]\d\d:?\d\d)$", text):
                text += "Z" if ":" in text else "T00:00:00Z"
            return pa.scalar(text).cast(type_)
        except (ValueError, OverflowError, pa.ArrowException):
            raise ValueError(f"{token} is no value of {column}, which is {type_}") from None

    def _family(self, column: str) -> str:
        return next(name for name, tests in FAMILIES if any(test(self.columns[column]) for test in tests))

    def _accept(self, token: str) -> bool:
        kind, text = self._token
        is_there = kind in ("keyword", "sign") and text == token
        self.position += is_there
        return is_there

    def _require(self, token: str) -> None:
        if not self._accept(token):
            self._fail(token)

    def _fail(self, expected: str, advice: str = "") -> NoReturn:
        raise ValueError(f"{expected} is missing before {self._token[1][:40]}{advice}")


def _number(token: str, kind: pa.DataType) -> pa.Scalar:
    if pa.types.is_floating(kind):
        number = pa.scalar(float(token)).cast(kind)
        if not math.isfinite(number.as_py()):
            raise ValueError
        return number
    value = float(token) if re.search("[.eE]", token) else int(token)
    if value != int(value):
        raise ValueError
    return pa.scalar(int(value), kind)
