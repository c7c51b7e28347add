"""The template in a Modelfile, rendered by Go's own text/template as Ollama does, beside the chat template."""

import json
import shutil
import subprocess

import pytest

from helpers.foreign_base import FAMILIES, write_base
from model.chat_format import ChatFormat
from model.tokenizer_files import load_tokenizer, read_tokenizer
from scripts.export.gguf_folder import modelfile

if shutil.which("go") is None:
    pytest.skip("Go is not installed, in whose templates Ollama writes turns: apt-get install golang-go",
                allow_module_level=True)  # fmt: skip

RENDER = """\
package main

import ("encoding/json"; "os"; "strings"; "text/template")

type Message struct { Role, Content string }

func main() {
	file, _ := os.ReadFile(os.Args[1])
	template_ := strings.Split(string(file), `\"\"\"`)[1]
	var messages []*Message
	if err := json.Unmarshal([]byte(os.Args[2]), &messages); err != nil { panic(err) }
	parsed := template.Must(template.New("turns").Parse(template_))
	if err := parsed.Execute(os.Stdout, map[string]any{"Messages": messages}); err != nil { panic(err) }
}
"""
TALKS = [
    [("user", "hi")],
    [("system", "be kind"), ("user", "hi"), ("assistant", "yo"), ("user", "more\n x")],
    [("user", "a"), ("assistant", "b {{ c }}"), ("user", "@")],
]


@pytest.fixture(scope="module")
def render(tmp_path_factory):
    folder = tmp_path_factory.mktemp("go")
    (folder / "main.go").write_text(RENDER)
    subprocess.run(["go", "build", "-o", "render", "main.go"], cwd=folder, check=True)
    return folder / "render"


@pytest.mark.parametrize("family", ["ours", *FAMILIES])
def test_turns_are_those_of_the_chat_template(render, family, tmp_path):
    tokenizer = load_tokenizer() if family == "ours" else read_tokenizer(write_base(tmp_path / "base", family))
    (tmp_path / "Modelfile").write_text(modelfile(ChatFormat.of(tokenizer), sees=True))
    for talk in TALKS:
        messages = [{"role": role, "content": words} for role, words in talk]
        wanted = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        told = json.dumps([{"Role": role, "Content": words} for role, words in talk])
        said = subprocess.run([render, tmp_path / "Modelfile", told], capture_output=True, text=True, check=True)
        assert said.stdout == wanted
