#!/usr/bin/env bash
# codecarbon without a network counts your grams of CO2 in Quebec.
#
# Guess: where the place cannot be looked up, there are no grams, or those of the world's average.
# Seen (codecarbon 3.3.2): a warning in the log, and a place in Quebec, whose electricity is nearly all hydropower. Here both
# addresses that it asks lead nowhere.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet codecarbon==3.3.2
export HTTPS_PROXY=http://127.0.0.1:9 HTTP_PROXY=http://127.0.0.1:9
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

from codecarbon.core.emissions import Emissions
from codecarbon.core.units import Energy
from codecarbon.external.geography import GeoMetadata
from codecarbon.input import DataSource

print("codecarbon", version("codecarbon"))
source = DataSource()
place = GeoMetadata.from_geo_js(source.geo_js_url)
grams = {
    name: 1000 * Emissions(source).get_private_infra_emissions(Energy.from_energy(kWh=1.0), geo)
    for name, geo in (("found", place), ("Poland", GeoMetadata("POL", "Poland")))
}
print("place found:", place.country_name, place.region, "grams of CO2 a kWh:", grams)
assert (place.country_iso_code, place.region.lower()) == ("CAN", "quebec")
assert grams["found"] < grams["Poland"] / 10
PYTHON
