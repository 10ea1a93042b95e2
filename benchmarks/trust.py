"""Claim: what owners are promised costs little: decisions, the record, secure sums, privacy, and hostile sites.

Each module of `trust_cases` measures some figures, beside their limit in the same run.
"""

import sys
from collections.abc import Callable, Mapping

from reporting import Figure, Options, Report, parser
from trust_cases import journal, policy, privacy, robust, secure

Case = Callable[[Report, bool], Mapping[str, Figure]]
CASES: Mapping[tuple[str, ...], Case] = {
    journal.KEYS: journal.measure,
    policy.KEYS: policy.measure,
    privacy.KEYS: privacy.measure,
    robust.KEYS: robust.measure,
    secure.KEYS: secure.measure,
}


def main() -> int:
    reading = parser("What the promises to owners cost, and what they hold against.")
    keys = sorted(key for keys in CASES for key in keys)
    reading.add_argument("--only", nargs="+", choices=keys, metavar="KEY", help=f"of {', '.join(keys)}")
    given = reading.parse_args()
    report = Report("trust", "What owners are promised", Options(given.quick, given.record, given.json))
    wanted = frozenset(given.only or keys)
    figures: dict[str, Figure] = {}
    for keys_, case in CASES.items():
        if wanted & {*keys_}:
            figures |= case(report, given.quick)
    report.finish(figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
