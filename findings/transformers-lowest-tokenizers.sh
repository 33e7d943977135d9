#!/usr/bin/env bash
# The lowest tokenizers that transformers 5 declares cannot be installed beside it.
#
# Guess: transformers 5.4.0 declares tokenizers>=0.22.0, so a project that supports it may name the same floor.
# Seen (transformers 5.4.0): tokenizers 0.22.0 and 0.22.1 allow huggingface-hub below 1.0 only, and transformers
# 5.4.0 needs 1.5.0 or later, so pip refuses both pairs; 0.22.2 is the first that fits. A floor is two packages' affair:
# install it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
fits() {
    "$folder/venv/bin/pip" install --dry-run transformers==5.4.0 "tokenizers==$1" >"$folder/said" 2>&1
}
for version in 0.22.0 0.22.1; do
    if fits "$version"; then
        echo "transformers 5.4.0 now installs with tokenizers $version"
        exit 1
    fi
    grep -q ResolutionImpossible "$folder/said" || { cat "$folder/said"; exit 1; }
    grep "tokenizers $version depends on" "$folder/said" | head -1
done
fits 0.22.2 || { cat "$folder/said"; exit 1; }
echo "transformers 5.4.0: tokenizers 0.22.0 and 0.22.1 refused, 0.22.2 taken"
