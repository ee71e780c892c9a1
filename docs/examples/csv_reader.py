"""A reader of one's own.

Questions on images in a CSV file with the columns id, image, question and answer.
"""

import csv
from dataclasses import dataclass
from typing import ClassVar

from llava_keeplora_recipes import Reader, RecipeError, Records
from llava_keeplora_recipes.errors import collect_errors
from llava_keeplora_recipes.paths import data_root_of, inside, set_folder, split_file
from llava_keeplora_recipes.records import image_files


@dataclass
class CsvReader(Reader):
    kinds: ClassVar = ("vqa",)

    delimiter: str = ","

    def read(self, recipe, split, data_root, problems=None):
        path, folder = split_file(recipe, split, data_root), set_folder(recipe, data_root)

        def record(row):
            if not row.get("answer"):
                raise RecipeError(f"record '{row.get('id')}' of {path.name} has no answer", "write one")
            return row, inside(folder, row["image"], f"record '{row['id']}'", data_root_of(recipe, data_root))

        with open(path, newline="", encoding="utf-8") as file:
            records = collect_errors(record, csv.DictReader(file, delimiter=self.delimiter), problems)
        return Records(
            ids=[row["id"] for row, _ in records],
            images=image_files([[image] for _, image in records]),
            labels=[None] * len(records),
            label_names=None,
            questions=[row["question"] for row, _ in records],
            answers=[[row["answer"]] for row, _ in records],
        )
