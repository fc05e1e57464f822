import json

import pytest

from keras_vit.reporting.texts import TEMPLATES, describe_prediction, load_texts, localize


def leaves(texts):
    if isinstance(texts, str):
        return [texts]
    values = texts.values() if isinstance(texts, dict) else texts
    return [leaf for value in values for leaf in leaves(value)]


def test_polish_numbers_have_decimal_commas_and_spaces_between_thousands():
    assert localize("1,234.5", "en") == "1,234.5"
    assert localize("1,234.5", "pl") == "1\u00a0234,5"
    assert localize(0.25, "pl") == "0,25"


@pytest.mark.parametrize(
    ("language", "expected"),
    [("en", "predicted cat, true {dog}"), ("pl", "przewidziana: cat, prawdziwa: {dog}")],
)
def test_a_wrong_prediction_names_both_classes(language, expected):
    assert describe_prediction("{dog}", "cat", language, ", ") == expected
    assert describe_prediction("{dog}", "cat", language) == expected.replace(", ", "\n")
    assert describe_prediction("cat", "cat", language) == "✓ cat"


def test_no_language_lacks_a_text():
    assert {path.stem for path in TEMPLATES.glob("*.json")} == {"en", "pl"}
    for path in TEMPLATES.glob("*.json"):
        assert all(text.strip() for text in leaves(json.loads(path.read_text(encoding="utf-8"))))


def test_the_pictures_have_polish_texts_of_their_own():
    english, polish = (leaves(load_texts(language)["figures"]) for language in ("en", "pl"))
    assert [a for a, b in zip(english, polish, strict=True) if a == b] == ["rollout"]
