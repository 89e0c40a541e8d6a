"""Sentiment of an English sentence, by the rules and lexicon of VADER: text in, a structured answer out."""

from typing import Annotated, Literal, TypedDict

from msgspec import Meta
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

MAX_TEXT_CHARACTERS = 280
"""VADER is made for a sentence; its time grows with the square of the emoji in it (1,000 take a second)."""
THRESHOLD = 0.05
"""What the authors of VADER take for neutral: a compound score between minus and plus this."""

Text = Annotated[str, Meta(min_length=1, max_length=MAX_TEXT_CHARACTERS, examples=["The food was great!"])]
Label = Literal["negative", "neutral", "positive"]


class Scores(TypedDict):
    """The shares of the three (they sum to 1), and all in one number from -1 to 1."""

    negative: float
    neutral: float
    positive: float
    compound: float


class Sentiment(TypedDict):
    label: Label
    scores: Scores


class SentimentModel:
    name, version = "vader-sentiment", "1.0.0"

    def load(self) -> None:
        self._analyzer = SentimentIntensityAnalyzer()

    def predict(self, text: Text) -> Sentiment:
        scores = self._analyzer.polarity_scores(text)
        negative, neutral, positive, compound = (scores[key] for key in ("neg", "neu", "pos", "compound"))
        label: Label = "positive" if compound >= THRESHOLD else "negative" if compound <= -THRESHOLD else "neutral"
        return {
            "label": label,
            "scores": {"negative": negative, "neutral": neutral, "positive": positive, "compound": compound},
        }
