"""Singular and plural forms for messages."""


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun in the singular or the plural, such as "1 image" or "1,418 images". The default plural adds "s" or "es"."""
    if number == 1:
        return f"1 {noun}"
    return f"{number:,} {plural or noun + ('es' if noun.endswith(('s', 'x', 'tch')) else 's')}"


def is_or_are(number: int) -> str:
    """The verb for a number of things: "is" or "are"."""
    return "is" if number == 1 else "are"
