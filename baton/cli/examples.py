"""What `baton --help` and the help of each command show beside their options: commands to copy."""

from __future__ import annotations

OVERVIEW = """\
first steps
  baton serve                          a router and two workers with a small model, on this machine
  baton chat                           talk to it, in a second terminal
  baton doctor                         what is wrong, while it runs or before it starts

find out what it can do
  baton bench --help                   put load on it and read what clients get
  baton model info PATH                memory and speed that a model needs
  baton plan --help                    pools for a load and latency targets
  baton simulate --help                the same load in virtual time

run it for others
  baton keys create NAME --file F      a key for somebody
  baton certs --help                   TLS between the processes
  baton drain --help, baton role -h    take a worker out, or move it to the other pool
  baton completion bash                completion for your shell

Every option of `baton serve` is also a setting: a YAML file (--config), the environment
(BATON_HTTP_PORT) or --set KEY=VALUE. `baton COMMAND --help` shows the options of a command.
"""

OF_COMMAND = {
    "serve": """\
examples
  baton serve --no-ray --model /path/to/huggingface/folder
  baton serve --prefill 1 --decode 2 --http-port 8080
  baton serve --set decode.engine.max_num_seqs=16
""",
    "chat": """\
examples
  baton chat --url http://127.0.0.1:8000 --system "Answer in one sentence."
  baton chat --once "Which city is the capital of France?" --temperature 0

In the conversation /reset forgets it and /exit ends it. Ctrl-C ends an answer only.
""",
    "model": """\
examples
  baton model info /path/to/huggingface/folder
""",
    "keys": """\
examples
  baton keys create acme --file keys.json --requests-per-minute 600
  baton serve --set router.tenants.keys_file=$PWD/keys.json
""",
    "completion": """\
examples
  baton completion bash > ~/.local/share/bash-completion/completions/baton
  baton completion zsh > ~/.zfunc/_baton         # with fpath+=~/.zfunc before compinit
  baton completion fish > ~/.config/fish/completions/baton.fish
""",
}
