# Sourced by the scripts beside this directory, after common.sh. Gives:
#   need_cargo_deb                        cargo-deb of crates.io, built here once, at $CARGO_DEB
#   debian_package BINARY VERSION TARGET DIR
#                                         make DIR/qchain_VERSION_ARCH.deb of a built program, named by DEBIAN_PACKAGE afterwards;
#                                         TARGET is what it was built for. What goes into it is said in Cargo.toml
# The same program gives the same bytes: times are SOURCE_DATE_EPOCH, owners root, the order is that of Cargo.toml.

CARGO_DEB_VERSION=3.8.0

need_cargo_deb() {
    local root
    root=$(realpath --canonicalize-missing "${CARGO_TARGET_DIR:-target}")/tools
    CARGO_DEB=$root/bin/cargo-deb
    [[ ! -x $CARGO_DEB || $("$CARGO_DEB" --version) != "cargo-deb $CARGO_DEB_VERSION" ]] || return 0
    echo "building cargo-deb $CARGO_DEB_VERSION" >&2
    # Beside what is built for the package itself, so that neither disturbs the other's flags.
    quietly env --unset RUSTFLAGS --unset CARGO_TARGET_DIR cargo install --quiet --locked --root "$root" --version "$CARGO_DEB_VERSION" cargo-deb
}

debian_package() {
    local binary=$1 version=$2 target=$3 out=$4 stage command shell
    stage=${CARGO_TARGET_DIR:-target}/$target/release/deb
    rm --recursive --force "$stage"
    mkdir --parents "$stage/man" "$out"
    # Stripped already: it is not looked for where cargo puts what it builds, and nothing is done to it.
    install --mode 755 "$binary" "$stage/qchain"
    "$binary" docs man | gzip --no-name --best >"$stage/man/qchain.1.gz"
    while read -r command; do
        "$binary" docs man "$command" | gzip --no-name --best >"$stage/man/qchain-$command.1.gz"
    done < <("$binary" docs commands)
    for shell in bash zsh fish; do
        "$binary" docs completion "$shell" >"$stage/completion.$shell"
    done
    DEBIAN_PACKAGE=$out/qchain_${version}_$(dpkg --print-architecture).deb
    quietly "$CARGO_DEB" deb --no-build --no-strip --locked --target "$target" --output "$DEBIAN_PACKAGE"
}
