"""What the words of scripts/download.py stand for: repositories of both hubs, their files, and what to type next."""

from dataclasses import dataclass
from pathlib import Path

from model.files import ROOT


@dataclass(frozen=True)
class Download:
    """Some files of one repository, which the hubs know under different names, and where they go."""

    repo_ids: dict[str, str]  # source -> owner/name
    folder: Path
    patterns: tuple[str, ...] = ()  # of paths in the repository; none: all but what is there twice
    repo_type: str = "model"
    revision: str | None = None


def _minimind(name: str, folder: str, *patterns: str, repo_type: str = "model", at_modelscope: str = "") -> Download:
    repo_ids = {"huggingface": f"jingyaogong/{name}", "modelscope": f"gongjy/{at_modelscope or name}"}
    return Download(repo_ids, ROOT / folder, patterns, repo_type)


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")  # the last one not everywhere
TOWER_FILES = ("config.json", "preprocessor_config.json", "model.safetensors", "pytorch_model.bin")
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors", "pytorch_model.bin", *TOKENIZER_FILES)

CLIP = Download(
    {"huggingface": "openai/clip-vit-base-patch16", "modelscope": "openai-mirror/clip-vit-base-patch16"},
    ROOT / "model/vision_model/clip-vit-base-patch16",
    TOWER_FILES,
)
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"  # at both hubs
SIGLIP2 = "model/vision_model/siglip2-base-p32-256-ve"
# A .pth says nothing of its tokenizer: it must lie beside it, where model.weights.read_tokenizer looks
MINIMIND2_TOKENIZER = _minimind("MiniMind2", "out/minimind2", *TOKENIZER_FILES)
WORDS = {
    "clip": (CLIP,),
    "siglip2": (_minimind("siglip2-base-p32-256-ve", SIGLIP2, *TOWER_FILES),),
    # the two hubs spell this one differently
    "llm": (
        _minimind("MiniMind2-Pytorch", "out/minimind2", "full_sft_512.pth", at_modelscope="MiniMind2-PyTorch"),
        MINIMIND2_TOKENIZER,
    ),
    "vlm": (_minimind("MiniMind2-V-PyTorch", "out/minimind2", "sft_vlm_512.pth"), MINIMIND2_TOKENIZER),
    "minimind3": (_minimind("minimind-3", "out/minimind3", *MODEL_FILES),),
    "minimind3v": (
        _minimind("minimind-3v-pytorch", "out/minimind3v", "sft_vlm_768.pth"),
        _minimind("minimind-3v", "out/minimind3v", *TOKENIZER_FILES),
    ),
    "smollm2": (Download({"huggingface": SMOLLM2, "modelscope": SMOLLM2}, ROOT / "out/smollm2", MODEL_FILES),),
    "dataset": (_minimind("minimind-v_dataset", "dataset/data", "*.parquet", repo_type="dataset"),),
}
NEXT = {
    "clip": "--vision_model model/vision_model/clip-vit-base-patch16, which is the default in its usual place",
    "siglip2": f"--vision_model {SIGLIP2}, in training with a decoder of your choice",
    "llm": "python trainer/train_pretrain_vlm.py --from_weight out/minimind2/full_sft_512.pth",
    "vlm": "fetch clip too, then: python eval_vlm.py --weight out/minimind2/sft_vlm_512.pth "
    "--vision_model model/vision_model/clip-vit-base-patch16",
    "minimind3": "python trainer/train_pretrain_vlm.py --from_weight out/minimind3",
    "minimind3v": "fetch siglip2 too, then: python eval_vlm.py --weight out/minimind3v/sft_vlm_768.pth "
    f"--vision_model {SIGLIP2}",
    "smollm2": "python trainer/train_pretrain_vlm.py --from_weight out/smollm2",
    "dataset": "name the file with --data_path, e.g. dataset/data/sft_i2t.parquet",
}
