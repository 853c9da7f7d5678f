"""A trained model in use where neither torch nor throughtime is installed: NumPy and ONNX Runtime are enough.

    throughtime fit vowels --cell lstm --run runs/vowels
    throughtime export runs/vowels --to onnx --out vowels.onnx
    python examples/without_torch.py vowels.onnx new.jsonl

Reads a line of JSON a sequence and writes a line with its label and probabilities, as `throughtime predict` does. A
sequence is {"id": "a", "x": [[0.5, 1.2], ...], "symbols": [["word"], ...]}: for each step the numbers in the order of
the features, and the symbols in the order of their columns; what the model does not read is left out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import onnxruntime


class Model:
    """An exported run: what it reads stands in the file's metadata."""

    def __init__(self, path: str) -> None:
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        metadata = self.session.get_modelmeta().custom_metadata_map
        self.words = {name: json.loads(metadata[f"throughtime.{name}"]) for name in ("task", "features", "classes")}
        vocabularies = json.loads(metadata["throughtime.vocabularies"])
        self.places = [{symbol: place for place, symbol in enumerate(known)} for known in vocabularies]

    def answers(self, sequences: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """What the model says of sequences, side by side in one batch, zero past each end."""
        lengths = [len(sequence.get("x") or sequence["symbols"]) for sequence in sequences]
        x = np.zeros((max(lengths), len(sequences), len(self.words["features"])))  # [T, B, features]
        symbols = np.zeros((*x.shape[:2], len(self.places)), np.int64)
        for row, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
            if x.shape[2]:
                x[:length, row] = np.reshape(sequence["x"], (length, -1))
            for column, places in enumerate(self.places):
                texts = [step if isinstance(step, str) else step[column] for step in sequence["symbols"]]
                symbols[:length, row, column] = [places.get(text, 0) for text in texts]  # 0: not in the vocabulary
        given = {"x": x, "symbols": symbols, "lengths": np.array(lengths)}
        given = {name: value for name, value in given.items() if value.shape[-1]}
        (probabilities,) = self.session.run(["probabilities"], given)
        for row, sequence in enumerate(sequences):
            each = probabilities[: lengths[row], row] if self.words["task"] == "tag" else probabilities[row]
            yield {"id": sequence.get("id", str(row + 1)), **self.said(each)}

    def said(self, probabilities: np.ndarray[Any, Any]) -> dict[str, Any]:
        classes = self.words["classes"]
        labels = [classes[place] for place in np.atleast_2d(probabilities).argmax(axis=1)]
        answer: dict[str, Any] = {"labels": labels} if self.words["task"] == "tag" else {"label": labels[0]}
        return {**answer, "probabilities": dict(zip(classes, probabilities.T.tolist(), strict=True))}


def main(path: str, lines: Iterable[str]) -> None:
    """Answer every line."""
    sequences = [json.loads(line) for line in lines if line.strip()]
    for answer in Model(path).answers(sequences):
        print(json.dumps(answer, ensure_ascii=False))


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1].endswith(".onnx"):
        with open(sys.argv[2], encoding="utf-8") as file:
            main(sys.argv[1], file)
    else:
        print("give an exported run and a file of sequences: python examples/without_torch.py MODEL.onnx FILE.jsonl")
