"""The command `llm2clip serve`: an endpoint for embeddings of texts and images, and for searches."""

from __future__ import annotations

import gc
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm2clip.command_line.settings import check_choices, setting
from llm2clip.models.places import DTYPE, ModelDtype
from llm2clip.search.search import check_places
from llm2clip.serving.addresses import is_loopback, listen
from llm2clip.serving.limits import Limits

logger = logging.getLogger(__name__)


@dataclass
class ServeConfig(Limits):
    """Settings of `llm2clip serve`."""

    model: str = setting("", "Hub id or folder of the model, of any library that llm2clip evaluate takes.")
    model_revision: str | None = setting(None, "Branch, tag or commit of the model on the Hub.")
    fast: bool = setting(False, "Embed texts with the model's query encoder (llm2clip distill-text), without its LLM.")
    query_encoder: str | None = setting(
        None, "Embed texts with this folder of llm2clip align --keep-images; the model embeds images alone."
    )
    truncate_dim: int | None = setting(None, "Keep the first values of embeddings only, scaled to unit length.")
    index: str | None = setting(None, "Folder or URL of an index of this model, for /search.")
    host: str = setting("127.0.0.1", "Address to listen on; another machine's clients need a token.")
    port: int = setting(8000, "Port; 0 for a free one.")
    token_env: str | None = setting(None, "Environment variable with the token that clients have to send.")
    token_file: str | None = setting(None, "File with the token that clients have to send.")
    served_model_name: str | None = setting(
        None, "Name of the model for clients; by default its Hub id, or the name of its folder."
    )
    dtype: ModelDtype = setting("float32", DTYPE)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)
        if not self.model:
            raise ValueError("the model is missing: llm2clip serve MODEL")
        if not 0 <= self.port < 65536:
            raise ValueError(f"port must be from 0 to 65535, not {self.port}.")
        if self.query_encoder and (self.fast or self.truncate_dim):
            raise ValueError("query_encoder embeds texts, as it was fitted: leave fast and truncate_dim out.")
        if self.token_env and self.token_file:
            raise ValueError("token_env and token_file are both given; choose one.")


def run(config: ServeConfig) -> dict[str, Any]:
    """Serve until SIGTERM or Ctrl-C, and finish what has been accepted.

    Raises:
        FileNotFoundError: The file of the token, the index or the model does not exist.
        ImportError: FastAPI or another library of the server is not installed.
        OSError: The model does not exist, or the address is taken.
        ValueError: Others could use the server without a token, the token is empty, or another model made the index.
    """
    check_places(config.index, config.model)
    # Here, so that missing libraries are reported before a large model is loaded, which takes minutes.
    from llm2clip.encoders import load_encoder
    from llm2clip.encoders.load import load_query_encoder
    from llm2clip.serving.app import create_app
    from llm2clip.serving.server import Server

    token = read_token(config)
    is_private = is_loopback(config.host)
    if token is None and not is_private:
        raise ValueError(
            f"at {config.host}, others could use the server: give them a token by --token-env or --token-file, or "
            "listen on 127.0.0.1."
        )
    with listen(config.host, config.port) as listener:
        encoder = load_encoder(
            config.model,
            config.model_revision,
            config.dtype,
            text_encoder="query" if config.fast else "llm",
            truncate_dim=config.truncate_dim,
            needs=["image"] if config.query_encoder else [],
        )
        if config.query_encoder is not None:
            encoder = load_query_encoder(config.query_encoder, config.dtype, images=encoder)
        index = None if config.index is None else open_index(config.index, encoder)
        hosts = {"localhost", "127.0.0.1", "[::1]", config.host.lower()} if is_private and token is None else None
        app = create_app(encoder, index, name=config.served_model_name, token=token, limits=config, hosts=hosts)
        # Otherwise all clients wait for half a second, every few thousand requests, while Python looks for garbage in
        # the modules of the libraries.
        gc.collect()
        gc.freeze()
        host, port = listener.getsockname()[:2]
        print(f"Listening on http://{f'[{host}]' if ':' in host else host}:{port} (Ctrl-C ends it)", flush=True)
        Server(app, config).run([listener])
    return {}


def read_token(config: ServeConfig) -> str | None:
    """Read the token of the settings; None if there is none.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The token is empty, or has characters that no header has.
    """
    if config.token_file:
        token, source = Path(config.token_file).read_text(encoding="utf-8").strip(), config.token_file
    elif config.token_env:
        token, source = os.environ.get(config.token_env, "").strip(), f"the environment variable {config.token_env}"
    else:
        return None
    if not token or not (token.isascii() and token.isprintable()) or " " in token:
        raise ValueError(f"{source} has no token: letters, digits and signs, without spaces.")
    return token


def open_index(location: str, encoder: Any) -> Any:
    """Open an index.

    Raises:
        FileNotFoundError: There is none.
        ValueError: Another model made it, or embeddings of another width.
    """
    from llm2clip.search.search_index import SearchIndex

    index = SearchIndex.open(location, encoder=encoder)
    index.encoder()  # compares it with the one that made the index
    return index
