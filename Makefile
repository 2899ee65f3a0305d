# One-word commands for developers; CONTRIBUTING.md says what each is for.
.PHONY: test slow lint types fix bench demo ci

test:   ; OMP_NUM_THREADS=1 uv run pytest -n auto
slow:   ; uv run pytest -m slow -o timeout=3600
lint:   ; uv run ruff check . && uv run ruff format --check .
types:  ; uv run mypy
fix:    ; uv run ruff check --fix . && uv run ruff format .
bench:  ; uv run rsplugins bench
demo:   ; uv run rsplugins certify
ci:     ; bash .ci/run
