"""A small server with vLLM's and SGLang's endpoints for adapters, which checks what it is sent; run as a script.

Its arguments are the largest rank, and a file that says the size of each linear layer of the base by name.
"""

import base64
import hashlib
import http.server
import json
import pickle
import re
import sys
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
import torch.multiprocessing
from torch import Tensor

KEY = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<factor>[AB])\.weight")


class Refused(Exception):
    """What is sent does not fit."""


def checked(tensors: dict[str, Tensor], config: dict[str, Any], sizes: dict[str, list[int]], max_rank: int) -> None:
    """Check an adapter as the servers read it: one rank and one scale, pairs of factors, layers of the base."""
    r = config["r"]
    if config["peft_type"] != "LORA" or config["use_dora"] or config["modules_to_save"] or config["use_rslora"]:
        raise Refused(f"this config is not served: {config}")
    if config["lora_alpha"] != r or config["rank_pattern"] or config["alpha_pattern"]:
        raise Refused("ranks or scales differ between layers")
    if r > max_rank:
        raise Refused(f"rank {r} is above --max-lora-rank {max_rank}")
    if not isinstance(config["target_modules"], list):
        raise Refused("target_modules is no list")
    for name, tensor in tensors.items():
        match = KEY.fullmatch(name)
        if match is None or match["layer"] not in sizes:
            raise Refused(f"{name} is no factor of a layer of the base")
        if match["layer"].rpartition(".")[2] not in config["target_modules"]:
            raise Refused(f"{name} is none of {config['target_modules']}")
        if name.replace("lora_A", "lora_B") not in tensors or name.replace("lora_B", "lora_A") not in tensors:
            raise Refused(f"{name} has no other half")
        in_features, out_features = sizes[match["layer"]]
        expected = (r, in_features) if match["factor"] == "A" else (out_features, r)
        if tuple(tensor.shape) != expected:
            raise Refused(f"{name} is {tuple(tensor.shape)}, expected {expected}")


def sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    adapters: ClassVar[dict[str, dict[str, str]]] = {}  # checksums by name of the adapter and of the tensor
    sizes: ClassVar[dict[str, list[int]]] = {}
    max_rank = 0

    def do_GET(self) -> None:
        self.answer(200, self.adapters)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        try:
            {
                "/v1/load_lora_adapter": self.load_directory,
                "/v1/unload_lora_adapter": self.unload,
                "/load_lora_adapter_from_tensors": self.load_tensors,
                "/unload_lora_adapter": self.unload,
            }[self.path](**body)
        except (Refused, KeyError, TypeError, OSError, pickle.UnpicklingError) as error:
            self.answer(400, {"error": f"{type(error).__name__}: {error}"})
        else:
            self.answer(200, {"success": True})

    def load_directory(self, lora_name: str, lora_path: str) -> None:
        directory = Path(lora_path)
        config = json.loads((directory / "adapter_config.json").read_text())
        self.load(lora_name, config, safetensors.torch.load_file(directory / "adapter_model.safetensors"))

    def load_tensors(
        self,
        lora_name: str,
        config_dict: dict[str, Any],
        serialized_named_tensors: list[str],
        expected_checksums: dict[str, str],
    ) -> None:
        tensors = {
            name: value.clone() for name, value in pickle.loads(base64.b64decode(serialized_named_tensors[0])).items()
        }
        if {name: sha256(value) for name, value in tensors.items()} != expected_checksums:
            raise Refused("the checksums of the tensors differ")
        self.load(lora_name, config_dict, tensors)

    def load(self, name: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        if name in self.adapters:
            raise Refused(f"{name} is loaded already")
        checked(tensors, config, self.sizes, self.max_rank)
        self.adapters[name] = {key: sha256(value) for key, value in tensors.items()}

    def unload(self, lora_name: str) -> None:
        del self.adapters[lora_name]

    def answer(self, code: int, body: Any) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_: Any) -> None:
        """Write nothing."""


if __name__ == "__main__":
    Handler.max_rank = int(sys.argv[1])
    Handler.sizes = json.loads(Path(sys.argv[2]).read_text())
    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
