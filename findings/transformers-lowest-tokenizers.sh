#!/usr/bin/env bash
# The lowest tokenizers that transformers 5 declares cannot be installed beside it.
#
# Guess: transformers 5.4.0 declares tokenizers>=0.22.0, so a project that supports it may name the same floor.
# Seen (transformers 5.4.0): tokenizers 0.22.0 allows huggingface-hub below 1.0 only, and transformers 5.4.0 needs 1.5.0 or
# later, so pip refuses the pair; 0.22.1 is the first that fits. A floor is more than one package's affair: install it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
fits() {
    "$folder/venv/bin/pip" install --dry-run transformers==5.4.0 "tokenizers==$1" >"$folder/said" 2>&1
}
if fits 0.22.0; then
    echo "transformers 5.4.0 now installs with tokenizers 0.22.0"
    exit 1
fi
grep "tokenizers 0.22.0 depends on" "$folder/said"
fits 0.22.1 || { cat "$folder/said"; exit 1; }
echo "transformers 5.4.0: tokenizers 0.22.0 refused, 0.22.1 taken"
