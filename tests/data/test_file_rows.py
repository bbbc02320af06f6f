"""Files lose no row and no word."""

import csv
import gzip
import json

import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2dmoe_pl.data import DatasetSource
from d2dmoe_pl.data.file_rows import articles_of, comma_separated_rows, hold_articles, paragraphs, tab_separated_rows
from d2dmoe_pl.errors import ConfigError

WORDS = st.text(st.sampled_from('ab",\t\n\r é'), max_size=8)
PLAIN = st.text(st.sampled_from('ab", é'), min_size=1, max_size=8)


def load(file, **kwargs):
    return DatasetSource(train=str(file), validation=str(file), test=str(file), **kwargs).load()["train"]


class TestDelimited:
    @given(st.lists(st.tuples(WORDS, WORDS), min_size=1))
    def test_what_is_quoted_comes_back(self, tmp_path_factory, rows):
        for delimiter, read in ((",", comma_separated_rows), ("\t", tab_separated_rows)):
            file = tmp_path_factory.mktemp("table") / "a.txt"
            with file.open("w", newline="") as opened:
                writer = csv.writer(opened, delimiter=delimiter, quoting=csv.QUOTE_ALL)
                writer.writerows([("text", "label"), *rows])
            assert [tuple(row.values()) for row in read(str(file))] == rows

    @given(st.lists(st.tuples(WORDS, WORDS), min_size=1), st.sampled_from(",;\t"), st.booleans())
    def test_what_parts_the_header_parts_the_rows(self, tmp_path_factory, rows, delimiter, all_quoted):
        file = tmp_path_factory.mktemp("table") / "a.csv"
        with file.open("w", newline="") as opened:
            quoting = csv.QUOTE_ALL if all_quoted else csv.QUOTE_MINIMAL
            csv.writer(opened, delimiter=delimiter, quoting=quoting).writerows([("text", "label"), *rows])
        assert [tuple(row.values()) for row in comma_separated_rows(str(file))] == rows

    def test_one_column_is_parted_by_nothing(self, tmp_path):
        (tmp_path / "a.csv").write_text("text\none; two\nthree\tfour\n")
        assert load(tmp_path / "a.csv")["text"][:] == ["one; two", "three\tfour"]

    @given(st.lists(st.tuples(PLAIN, PLAIN), min_size=1))
    def test_tabs_part_values_with_any_quotes_in_them(self, tmp_path_factory, rows):
        file = tmp_path_factory.mktemp("table") / "a.tsv"
        file.write_text("".join(f"{a}\t{b}\n" for a, b in [("text", "label"), *rows]), newline="")
        read = [tuple(row.values()) for row in tab_separated_rows(str(file))]
        assert len(read) == len(rows)
        for row, written in zip(read, rows, strict=True):
            for value, other in zip(row, written, strict=True):
                quoted = len(other) > 1 and other[0] == other[-1] == '"'
                assert value == other or quoted

    def test_a_few_fields_that_open_with_a_quote(self, tmp_path):
        lines = [f"{chr(34) * (i % 17 == 0)}text {i}\t{'ab'[i % 2]}\n" for i in range(120)]
        (tmp_path / "a.tsv").write_text("".join(["text\tlabel\n", *lines]))
        split = load(tmp_path / "a.tsv")
        assert len(split) == 120
        assert split[17] == {"text": '"text 17', "label": "b"}

    def test_a_quoted_tsv_with_lines_in_its_values(self, tmp_path):
        (tmp_path / "a.tsv").write_text('text\tlabel\n"two\nlines"\ta\n"a\ttab"\tb\nplain\ta\n')
        assert load(tmp_path / "a.tsv")["text"][:] == ["two\nlines", "a\ttab", "plain"]

    def test_words_that_other_programs_take_for_nothing(self, tmp_path):
        words = ["null", "NA", "None", "nan", "N/A", "NULL", "", "true"]
        (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"x,{word}\n" for word in words))
        assert load(tmp_path / "a.csv")["label"][:] == words

    @pytest.mark.parametrize("folder", [False, True])
    def test_they_are_words_in_a_folder_as_well(self, tmp_path, folder):
        for name in ("train", "validation", "test"):
            (tmp_path / f"{name}.csv").write_text("text,label\nNA,null\nb,None\n")
        splits = DatasetSource(str(tmp_path)).load()
        assert splits["test"].to_list() == [{"text": "NA", "label": "null"}, {"text": "b", "label": "None"}]

    def test_a_mark_at_the_head_blank_lines_and_compression(self, tmp_path):
        content = "\ufefftext,label\r\n\r\na,b\r\n\r\n".encode()
        (tmp_path / "a.csv").write_bytes(content)
        with gzip.open(tmp_path / "b.csv.gz", "wb") as opened:
            opened.write(content)
        for name in ("a.csv", "b.csv.gz"):
            assert load(tmp_path / name).to_list() == [{"text": "a", "label": "b"}]

    def test_a_changed_file_is_read_anew(self, tmp_path):
        for text in ("a", "bc"):
            (tmp_path / "a.csv").write_text(f"text,label\n{text},x\n")
            assert load(tmp_path / "a.csv")["text"][:] == [text]

    def test_streams_read_the_same_rows(self, tmp_path):
        for i in range(2):
            (tmp_path / f"{i}.tsv").write_text(f'text\tlabel\n"{i}\tx\nNA\ty\n')
        stream = DatasetSource(train=str(tmp_path / "*.tsv"), validation=None, test=None).stream()["train"]
        assert [row["text"] for row in stream] == ['"0', "NA", '"1', "NA"]
        assert stream.num_shards == 2

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "a.csv: is empty; must begin with a line of column names"),
            (b"text,label\n", "a.csv: has no rows; must have one at least"),
            (b"text,label\na,b\nc,d,e\n", r"a.csv: line 3: has 3 values; must be 2, as in the header \(text, label\)"),
            (b"text,label\na,b\nc\n", "a.csv: line 3: has 1 values; must be 2"),
            (b"text,label\na,b\n\xff\xfe,d\n", "a.csv: line 3: not UTF-8"),
            (b'text,label\n"a\n,b\n"x" y,z\n', "a.csv: line 2: a quote is out of place"),
            (b'text,label\n"a,b\n', "a.csv: line 2: a quote is out of place"),
            (b"text,text\na,b\n", "a.csv: line 1: the column 'text' stands there twice"),
        ],
    )
    def test_what_is_malformed_is_told_with_its_line(self, tmp_path, content, message):
        (tmp_path / "a.csv").write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            load(tmp_path / "a.csv")


FIRST = " \n = First = \n \n It is one .\n\n = = Section = = \n \n where x\n = 3 \n = 1 / s = \n = y \n"
SECOND = " \n = Second article = \n \n More .\n \n = = = Deep = = = \n \n End"


def streamed(file):
    stream = DatasetSource(train=str(file), validation=None, test=None).stream()["train"]
    return [row["text"] for row in stream]


class TestArticles:
    @pytest.mark.parametrize("ends", ["\n", "\r\n"])
    def test_each_begins_with_its_title(self, tmp_path, ends):
        text = (FIRST + SECOND).replace("\n", ends)
        (tmp_path / "a.txt").write_text(text, newline="")
        articles = load(tmp_path / "a.txt")["text"][:]
        assert [each.strip().partition(ends)[0] for each in articles] == ["= First = ", "= Second article = "]
        assert "".join(articles) == text
        assert streamed(tmp_path / "a.txt") == articles

    def test_each_file_may_be_one(self, tmp_path):
        texts = [f" = {name} = \n\n words" for name in "abc"]
        for name, text in zip("abc", texts, strict=True):
            (tmp_path / f"{name}.txt").write_text(text)
        assert load(tmp_path / "*.txt")["text"][:] == texts == streamed(tmp_path / "*.txt")

    def test_one_goes_on_in_the_next_file(self, tmp_path):
        parts = (FIRST[:40], FIRST[40:] + SECOND + " .\n", FIRST)
        for name, part in zip("abc", parts, strict=True):
            (tmp_path / f"{name}.txt").write_text(part)
        articles = load(tmp_path / "*.txt")["text"][:]
        assert articles[0].startswith(" \n = First = ")
        assert len(articles) == 3
        assert "".join(articles) == "".join(parts)
        assert "".join(streamed(tmp_path / "*.txt")) == "".join(parts)
        assert len(streamed(tmp_path / "*.txt")) == 4

    @pytest.mark.parametrize(
        "text", [SECOND.replace("= Second", "= = Second"), " = 3 \n\na", " = 3 = \na", " = = \n", "a"]
    )
    def test_what_begins_otherwise_has_paragraphs(self, tmp_path, text):
        (tmp_path / "a.txt").write_text(text)
        (tmp_path / "b.txt").write_text(SECOND)
        assert hold_articles([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]) == [False, True]
        assert load(tmp_path / "a.txt")["text"][:] == [row["text"] for row in paragraphs(str(tmp_path / "a.txt"))]
        assert load(tmp_path / "*.txt")["text"][-1] == SECOND

    @given(st.lists(st.sampled_from([" \n", "\n", " = A = \n", " = = B = = \n", " c\n", " = 3 \n"])))
    def test_no_text_is_lost(self, tmp_path_factory, lines):
        file = tmp_path_factory.mktemp("articles") / "a.txt"
        file.write_text(" = A = \n\n" + "".join(lines))
        assert "".join(row["text"] for row in articles_of([str(file)])) == file.read_text()


class TestOtherFiles:
    def test_lines_of_blanks_part_paragraphs(self, tmp_path):
        (tmp_path / "a.txt").write_text(" \n = Title = \n \n one\n two \n\n\t\n three")
        assert [row["text"] for row in paragraphs(str(tmp_path / "a.txt"))] == [" = Title = ", " one\n two ", " three"]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b'{"text": "a"}\n{"text": \n', "a.jsonl: line 2: not JSON"),
            (b'{"text": "\xff"}\n', "a.jsonl: line 1: not UTF-8"),
            (
                b'{"version": 1, "data": [{"text": "a"}, {"text": "b"}]}',
                "a.jsonl: is one object, with rows in 'data'; must be a list of rows, or a row a line",
            ),
            (
                pandas.DataFrame({"text": ["a", "b"], "label": [0, 1]}).to_json().encode(),
                "a.jsonl: is one object, with rows in 'text', 'label'; must be a list of rows, or a row a line",
            ),
            (
                pandas.DataFrame({"text": ["a", "b"], "label": [0, 1]}).to_json(orient="index").encode(),
                "a.jsonl: is one object, with rows in '0', '1'; must be a list of rows, or a row a line",
            ),
        ],
    )
    def test_json_that_is_none(self, tmp_path, content, message):
        (tmp_path / "a.jsonl").write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            load(tmp_path / "a.jsonl")

    def test_a_stray_file_among_those_of_a_pattern(self, tmp_path):
        (tmp_path / "a.csv").write_text("text\na\n")
        (tmp_path / "notes.json").write_text("{")
        with pytest.raises(
            ConfigError, match=r"train='.*': all files must end in .csv, as .*a.csv does, but there is .*n"
        ):
            load(tmp_path / "*")

    @pytest.mark.parametrize("ending", ["csv", "jsonl"])
    def test_a_name_that_looks_like_a_pattern(self, tmp_path, ending):
        texts = {"a[1]": "wanted", "a1": "another"}
        for name, text in texts.items():
            rows = {"csv": f"text\n{text}\n", "jsonl": json.dumps({"text": text}) + "\n"}
            (tmp_path / f"{name}.{ending}").write_text(rows[ending])
        assert load(tmp_path / f"a[1].{ending}")["text"][:] == ["wanted"]
        (tmp_path / f"a[1].{ending}").unlink()
        assert load(tmp_path / f"a[1].{ending}")["text"][:] == ["another"]

    def test_a_malformed_file_in_a_folder(self, tmp_path):
        for name in ("train", "train-more", "test", "validation"):
            (tmp_path / f"{name}.csv").write_text("text,label\na,b\n")
        (tmp_path / "train-more.csv").write_text("text,label\na,b,c\n")
        with pytest.raises(ConfigError, match=r"train-more.csv: line 2: has 3 values; must be 2"):
            DatasetSource(str(tmp_path)).load()

    def test_too_few_samples_to_hold_any_out(self, tmp_path):
        (tmp_path / "a.csv").write_text("text\na\n")
        message = (
            "validation=None: is held out of the train split, whose 1 samples are too few for the share held_out=0.1"
        )
        with pytest.raises(ConfigError, match=message):
            DatasetSource(train=str(tmp_path / "a.csv"), validation=None, test=None).load()


class TestTaggedWords:
    SENTENCES = (
        "-DOCSTART- -X- O\n\n# id = 1\nEU NNP B-ORG\nrejects VBZ O\n\n\n# O\nItem NN O\n",
        "\ufeffEU\tNNP\tB-ORG\r\nrejects\tVBZ\tO\r\n\r\n#\tO\r\nItem\tO",
    )

    @pytest.mark.parametrize("ending", ["conll", "iob2", "bio.gz"])
    @pytest.mark.parametrize("text", SENTENCES)
    def test_sentences_with_a_tag_a_word(self, tmp_path, ending, text):
        file = tmp_path / f"a.{ending}"
        file.write_bytes(gzip.compress(text.encode()) if ending.endswith("gz") else text.encode())
        assert list(load(file)) == [
            {"tokens": ["EU", "rejects"], "ner_tags": ["B-ORG", "O"]},
            {"tokens": ["#", "Item"], "ner_tags": ["O", "O"]},
        ]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("EU B-ORG\nrejects\n", "a.conll: line 2: has one value; must be a word, and its tag behind it"),
            ("1\tEU" + "\t_" * 8, "a.conll: line 1: begins with a word's number, as those of CoNLL-U do"),
            ("\n\n", "a.conll: has no rows"),
        ],
    )
    def test_what_is_none(self, tmp_path, text, message):
        (tmp_path / "a.conll").write_text(text)
        with pytest.raises(ConfigError, match=message):
            load(tmp_path / "a.conll")

    @pytest.mark.parametrize("ending", ["tsv", "txt"])
    def test_under_another_ending_it_says_which(self, tmp_path, ending):
        (tmp_path / f"a.{ending}").write_text("EU\tB-ORG\nrejects\tO\n\nItem\tO\n")
        with pytest.raises(ConfigError, match=rf"a.{ending}: has a word and its tag in each line; must end in .conll"):
            load(tmp_path / f"a.{ending}")
