"""`--to gguf`: a model as llama.cpp's two files, text and sight, with what Ollama and a reader need beside them."""

from pathlib import Path

import torch

from model.chat_format import ChatFormat
from model.config import VLMConfig
from scripts.export.exported import Exported, Source
from scripts.export.gguf_proof import prove_gguf, write_references
from scripts.export.gguf_sight import POSITIONS, add_sight_facts, check_sight, sight_tensors
from scripts.export.gguf_text import add_text_facts, architecture, text_tensors
from scripts.export.gguf_tokenizer import add_tokenizer
from scripts.export.gguf_writing import finish, need_gguf, new_file
from scripts.export.llama_cpp import MODEL, ROLLED, SIGHT, need_xllamacpp
from scripts.export.writing import round_weights

MODELFILE = "Modelfile"

ASK = """\
import xllamacpp

params = xllamacpp.CommonParams()
params.model.path = "model.gguf"{mmproj}
params.n_ctx = 4096
server = xllamacpp.Server(params)
answer = server.handle_chat_completions({{"messages": [{{"role": "user", "content": {content}}}], "temperature": 0}})
print(answer["choices"][0]["message"]["content"])"""
ASK_SEEING = {
    "mmproj": '\nparams.mmproj.path = "mmproj.gguf"',
    "content": '[{"type": "image_url", "image_url": {"url": PICTURE}}, {"type": "text", "text": "\\nWhat is it?"}]',
}
ASK_DECODER = {"mmproj": "", "content": '"Hello"'}
COMMANDS = """\
## llama.cpp, Ollama

```sh
llama-server -m model.gguf{mmproj} --jinja        # an OpenAI API and a page for the browser
{command}
ollama create {name} -f Modelfile && ollama run {name}
```
"""
ASK_AT_ONCE = (
    "llama-mtmd-cli -m model.gguf --mmproj mmproj.gguf --jinja --temp 0 --image square.png -p $'\\nWhat is it?'"
)
SQUARES = """
`PICTURE` is an address like `data:image/png;base64,...`. **Make pictures square before, by squeezing them**: the model
learnt from whole pictures squeezed to {side} x {side} pixels, and llama.cpp pads what is not square. Put the picture
first, then a line break, then the question.
"""


def export_gguf(source: Source, folder: Path) -> Exported:
    """model.gguf, for models that see mmproj.gguf, and a Modelfile.

    Raises:
        UserError: a package is missing, or llama.cpp would compute something else.
    """
    for need in (need_gguf, need_xllamacpp):
        need()
    model, config = source.model, source.model.config
    kind = architecture(config)
    if source.sees:
        check_sight(config)
    round_weights(model, source.dtype, with_tower=True)
    writer = new_file(folder / MODEL, kind, source.numbers)
    add_text_facts(writer, config, source.name)
    add_tokenizer(writer, source.tokenizer, config.vocab_size)
    finish(writer, text_tensors(model, kind), source.numbers)
    if source.sees:
        _write_sight(source, folder)
    (folder / MODELFILE).write_text(modelfile(ChatFormat.of(source.tokenizer), source.sees), encoding="utf-8")
    return Exported(
        kind=f"GGUF files for llama.cpp and all that builds on it: text as its `{kind}`"
        + (f", and the tower with its projector in `{SIGHT}`." if source.sees else "; it sees no pictures."),
        usage=ASK.format(**(ASK_SEEING if source.sees else ASK_DECODER)),
        further=_how_to_run(source),
        sees=source.sees, has_tower=source.sees, dtype=source.numbers, library="gguf", trains=False,
        refer=write_references, prove=prove_gguf,
    )  # fmt: skip


def _write_sight(source: Source, folder: Path) -> None:
    """The mmproj; where the tower has a class token a second one, for a llama.cpp that puts it behind the patches."""
    tensors = sight_tensors(source.model)
    files = {SIGHT: tensors}
    if "v.class_embd" in tensors:
        files[ROLLED] = {**tensors, POSITIONS: torch.roll(tensors[POSITIONS], -1, dims=0)}
    for name, content in files.items():
        writer = new_file(folder / name, "clip", source.numbers)
        add_sight_facts(writer, source.model.config, source.name)
        finish(writer, content, source.numbers)


def _how_to_run(source: Source) -> str:
    config = source.model.config
    if not isinstance(config, VLMConfig):
        return COMMANDS.format(mmproj="", command='llama-cli -m model.gguf --jinja -p "Hello"', name=source.name)
    text = COMMANDS.format(mmproj=" --mmproj mmproj.gguf", command=ASK_AT_ONCE, name=source.name)
    return text + SQUARES.format(side=config.image_size)


def modelfile(chat: ChatFormat, sees: bool) -> str:
    """For `ollama create`: the files, the turns as Go's templates write them, and what ends an answer."""
    opening, closing = dict(chat.open), dict(chat.close)
    turns = "".join(
        f'{{{{ if eq .Role "{role}" }}}}{opening[role]}{{{{ .Content }}}}'
        f"{chat.end if role == 'assistant' else ''}{closing[role]}{{{{ end }}}}"
        for role in opening
    )
    beginning = chat.begin and f'{{{{ if ne (index .Messages 0).Role "system" }}}}{chat.begin}{{{{ end }}}}'
    template = f"{beginning}{{{{ range .Messages }}}}{turns}{{{{ end }}}}{opening['assistant']}"
    lines = [f"FROM ./{name}" for name in ((MODEL, SIGHT) if sees else (MODEL,))]
    lines += [f'TEMPLATE """{template}"""', f'PARAMETER stop "{chat.end.strip()}"', "PARAMETER temperature 0"]
    return "\n".join(lines) + "\n"
