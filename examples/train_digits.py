"""Trains the classifier of digits.py on the 1,797 images that scikit-learn ships: python -m examples.train_digits"""

import os
from pathlib import Path

from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import train_test_split
from skops.io import dump

from examples.digits import WEIGHTS


def main() -> None:
    """Write the weights to $DIGITS_WEIGHTS, by default examples/weights/digits.skops."""
    images, labels = load_digits(return_X_y=True)
    # A quarter is held out, the same at every run: the tests predict it.
    train_images, test_images, train_labels, test_labels = train_test_split(images, labels, random_state=0)
    classifier = RandomForestClassifier(random_state=0).fit(train_images, train_labels)
    path = Path(os.environ.get("DIGITS_WEIGHTS", WEIGHTS))
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(".new")
    dump(classifier, whole)
    whole.replace(path)  # a service that reloads meanwhile finds the old file or the new one, never half of one
    accuracy = classifier.score(test_images, test_labels)
    print(f"{path}: {accuracy:.1%} of {len(test_labels)} images that it has not seen are read right")  # noqa: T201 - a program for users


if __name__ == "__main__":
    main()
