"""VLMEvalKit's run.py with our engine in it: all of its flags, a model class of ours, and two kinds of data sets.

    LMUData=FOLDER PRED_FORMAT=tsv python scripts/judge/vlmeval_wrapper.py --config run.json --judge exact_matching

run.json, with x.tsv in the FOLDER:

    {"model": {"mine": {"class": "MiniMindVLM", "weight": "out/sft_vlm_192.safetensors"}},
     "data": {"x": {"class": "ExactMatch", "dataset": "x"}}}

`CustomMCQDataset` is VLMEvalKit's own class for tables with choices. scripts/judge/vlmevalkit.py writes all of that.
"""

from pathlib import Path

import pandas
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer  # noqa: F401  before any stand-in

from model.inference.answerer import Answerer, Options, user_turn
from model.pictures import open_picture
from scripts.judge.stand_ins import stand_ins

with stand_ins("vlmeval"):
    import vlmeval.dataset
    import vlmeval.run
    import vlmeval.vlm
    from vlmeval.dataset.image_vqa import CustomVQADataset
    from vlmeval.dataset.image_yorn import ImageYORNDataset
    from vlmeval.smp import LMUDataRoot
    from vlmeval.vlm.base import BaseModel


class MiniMindVLM(BaseModel):
    """A file of ours, or a folder as transformers saves it, asked at temperature 0."""

    INTERLEAVE = True

    def __init__(
        self,
        weight: str,
        max_new_tokens: int = 64,
        device: str = "auto",
        dtype: str = "auto",
        plain: bool = False,
        first_prompt: str = "",
    ):
        """plain: ask without the choices. first_prompt: a file that what is asked first is written to."""
        super().__init__()
        self.plain = plain
        self.answerer = Answerer.from_weight(weight, device=device, dtype=dtype)
        self.options, self.first_prompt = Options(max_new_tokens), first_prompt and Path(first_prompt)

    def use_custom_prompt(self, dataset: str) -> bool:
        return self.plain

    def build_prompt(self, line: pandas.Series, dataset: str | None = None) -> list[dict]:
        """The question without its choices."""
        lines = [line[name] for name in ("hint", "question") if isinstance(line.get(name), str) and line[name]]
        pictures = [{"type": "image", "value": path} for path in self.dump_image(line, dataset)]
        return [*pictures, {"type": "text", "value": "\n".join(lines)}]

    def generate_inner(self, message: list[dict], dataset: str | None = None) -> str:
        """message: texts and paths of pictures. The pictures come first, as in training."""
        pictures = [open_picture(part["value"]) for part in message if part["type"] == "image"]
        text = "\n".join(part["value"] for part in message if part["type"] == "text").strip()
        turn = user_turn(text, len(pictures))
        if self.first_prompt:
            said = "".join(part.get("text", "<image>") for part in turn["content"])
            self.first_prompt.write_text(said, encoding="utf-8")
            self.first_prompt = ""
        return self.answerer.batch([self.answerer.prompt([turn], pictures)], self.options)[0].text.strip()


def read_table(path: str | Path) -> pandas.DataFrame:
    """A .tsv as it is written: no number and no missing value is made of a text."""
    return pandas.read_csv(path, sep="\t", dtype=str, keep_default_na=False)


def _local(dataset: str) -> pandas.DataFrame:
    """The questions of a data set; those without a picture are left out by the harness."""
    table = read_table(Path(LMUDataRoot()) / f"{dataset}.tsv")
    return table.assign(image=table["image"].where(table["image"] != ""))


class ExactMatch(CustomVQADataset):
    """Questions whose answer must be the right one to the letter, as scripts/score.py has it."""

    def load_data(self, dataset: str) -> pandas.DataFrame:
        return _local(dataset)

    def evaluate(self, eval_file: str, **judge: object) -> dict[str, float]:
        answers = read_table(eval_file)
        hit = (answers["prediction"].str.strip() == answers["answer"].str.strip()).astype(int)
        answers.assign(hit=hit).to_csv(eval_file.replace(".tsv", "_exact_result.tsv"), sep="\t", index=False)
        return {"Overall": hit.mean(), **hit.groupby(answers["category"]).mean().to_dict()}


class YesNo(ImageYORNDataset):
    """VLMEvalKit's rule for yes and no, on a table that lies here."""

    DATASET_URL: dict = {}
    DATASET_MD5: dict = {}

    def load_data(self, dataset: str) -> pandas.DataFrame:
        table = _local(dataset)
        return table.assign(answer=table["answer"].str.capitalize())


vlmeval.vlm.MiniMindVLM = MiniMindVLM
vlmeval.dataset.ExactMatch, vlmeval.dataset.YesNo = ExactMatch, YesNo

if __name__ == "__main__":
    vlmeval.run.main()
