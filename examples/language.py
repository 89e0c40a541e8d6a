"""The language of a text, one of 140, by py3langid: text in, label and probability out."""

from typing import Annotated, TypedDict

from msgspec import Meta
from py3langid.langid import MODEL_FILE, LanguageIdentifier

MAX_TEXT_CHARACTERS = 10_000

Text = Annotated[str, Meta(min_length=1, max_length=MAX_TEXT_CHARACTERS, examples=["Wo ist der Bahnhof?"])]
Probability = Annotated[float, Meta(ge=0, le=1)]


class Language(TypedDict):
    """The ISO 639 code of the language that the text is most probably in, and how sure that is."""

    label: str
    probability: Probability


class LanguageModel:
    name, version = "language", "1.0.0"

    def load(self) -> None:
        self._identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)

    def predict(self, text: Text) -> Language:
        if not any(character.isalpha() for character in text):
            raise ValueError("There is no letter in the text, so it is in no language.")  # answered with 422
        label, probability = self._identifier.classify(text)
        return {"label": label, "probability": round(probability, 6)}
