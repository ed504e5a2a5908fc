"""Secrets and personal data that should not be uploaded: found in bulk, counted, and masked.

Patterns of well-known shape only; names, addresses or passwords in free text are not found.
"""

import re
from bisect import bisect_right
from itertools import accumulate

KEYS = (r"\b(?:sk-[A-Za-z0-9_-]{20,}|(?:AKIA|ASIA)[0-9A-Z]{16}\b|gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{30,}"
        r"|xox[abprs]-[\w-]{10,}|AIza[\w-]{35}|hf_[A-Za-z0-9]{30,}|glpat-[\w-]{20,})"
        r"|-----BEGIN [A-Z ]{0,20}PRIVATE KEY-----")
SIGNS = ("sk-", "AKIA", "ASIA", "gh", "xox", "AIza", "hf_", "glpat-", "PRIVATE KEY")
EMAIL = r"(?<![\w.+-])[\w.+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63})*\.[A-Za-z]{2,24}\b"
# What stands before is looked at after the first digit, so that the search can leap from digit to digit.
CARD = r"[3-6](?<![\d-][3-6])\d{3}(?:(?:[ -]?\d{4}){2}[ -]?\d{1,7}|[ -]\d{6}[ -]?\d{5})(?![\d-])"
KINDS = {
    "secret_keys": (re.compile(KEYS), "[KEY]"),
    "email_addresses": (re.compile(EMAIL), "[EMAIL]"),
    "card_numbers": (re.compile(CARD), "[CARD]"),
}


def find(texts: list[str]) -> dict[str, list[int]]:
    """For each kind the places in `texts` where it occurs, one entry for each occurrence."""
    whole = "\n".join(texts)
    begins = [0, *accumulate(len(text) + 1 for text in texts)]
    found: dict[str, list[int]] = {}
    for kind, (pattern, _) in KINDS.items():
        if kind == "email_addresses":
            spots = _email_spots(whole)
        elif kind == "secret_keys" and not any(sign in whole for sign in SIGNS):
            continue
        else:
            spots = [match.start() for match in pattern.finditer(whole) if kind != "card_numbers" or _luhn(match[0])]
        if spots:
            found[kind] = [bisect_right(begins, spot) - 1 for spot in spots]
    return found


def mask(text: str, kind: str) -> str:
    """The text with each occurrence of one kind replaced by a word in brackets."""
    pattern, word = KINDS[kind]
    if kind == "card_numbers":
        return pattern.sub(lambda match: word if _luhn(match[0]) else match[0], text)
    return pattern.sub(word, text)


def _email_spots(whole: str) -> list[int]:
    """Begins of e-mail addresses, looked for around each @ only: the pattern alone would try every word."""
    pattern, spots, at, done = KINDS["email_addresses"][0], [], whole.find("@"), 0
    while at >= 0:
        if match := pattern.search(whole, max(done, at - 65), at + 400):
            spots.append(match.start())
            done = match.end()
        at = whole.find("@", max(at + 1, done))
    return spots


def _luhn(text: str) -> bool:
    """Whether the digits carry the check digit of a card number (ISO/IEC 7812-1), which most numbers do not."""
    digits = [int(sign) for sign in reversed(text) if sign.isdigit()]
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and (
        sum(digits[::2]) + sum(sum(divmod(2 * digit, 10)) for digit in digits[1::2])) % 10 == 0
