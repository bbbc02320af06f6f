"""Small SQuAD files with questions that can be answered, and a tokenizer's words for them."""

import json

from d2dmoe_pl.data import DatasetSource, SQuAD

WORDS = ["who", "what", "is", "red", "green", "blue", "cat", "dog", "eel", "fox", "gnu", "?"]
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
CONTEXT = "The  red cat, (so) the dog"
LENGTHS = {"max_length": 11, "doc_stride": 2, "max_question_length": 4, "max_answer_length": 3}


def no_answer():
    return {"text": [], "answer_start": []}


def question(i, answerless=False):
    """A question whose answer is the one animal among colours."""
    colours, animals = ["red", "green", "blue"], ["cat", "dog", "eel", "fox", "gnu"]
    words = [colours[(i + j) % 3] for j in range(5)]
    words.insert(i % 6, animals[i % 5])
    context, answer = " ".join(words), animals[i % 5]
    start = context.index(answer)
    answers = no_answer() if answerless else {"text": [answer, f"the {answer}"], "answer_start": [start, start]}
    return {"id": str(i), "title": "t", "context": context, "question": "who is it ?", "answers": answers}


def write(folder, answerless=lambda i: False):
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"train": range(30), "validation": range(40, 49), "test": range(50, 57)}
    files = {}
    for name, numbers in parts.items():
        rows = [question(i, answerless(i)) for i in numbers]
        files[name] = str(folder / f"{name}.jsonl")
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DatasetSource(**files)


def squad(tmp_path, tokenizer_path, version=1, **kwargs):
    answerless = (lambda i: i % 4 == 1) if version == 2 else (lambda i: False)
    source = write(tmp_path / str(version), answerless)
    return SQuAD(tokenizer_path, version, source, **{"batch_size": 5, **LENGTHS, **kwargs})
