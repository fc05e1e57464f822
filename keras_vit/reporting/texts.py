"""The texts of reports and pictures in each language, and how the language writes numbers."""

import json
import pathlib

TEMPLATES = pathlib.Path(__file__).parent / "templates"


def load_texts(language):
    """The texts of a language.

    Args:
        language: `"en"` or `"pl"`.

    Returns:
        Nested dictionary of strings, as `templates/<language>.json` holds them.
    """
    return json.loads((TEMPLATES / f"{language}.json").read_text(encoding="utf-8"))


def localize(number, language):
    """A number as the language writes it.

    Args:
        number: number, or string of one with `.` for decimals and `,` between thousands.
        language: `"en"` or `"pl"`; Polish takes a comma for decimals, and spaces between thousands.

    Returns:
        String.
    """
    if language == "en":
        return str(number)
    return str(number).replace(",", "\u00a0").replace(".", ",")


def describe_prediction(true_class, predicted_class, language, separator="\n"):
    """The class of an image that was predicted correctly; else the predicted and the true class.

    Args:
        true_class: string.
        predicted_class: string.
        language: `"en"` or `"pl"`.
        separator: string between the two parts of a wrong prediction.

    Returns:
        String.
    """
    if predicted_class == true_class:
        return f"✓ {true_class}"
    parts = load_texts(language)["figures"]["misclassified"]
    return separator.join(parts).format(predicted=predicted_class, true=true_class)
