# Sourced by the scripts beside this directory, after common.sh. Gives:
#   debian_package BINARY VERSION DIR   make DIR/qchain_VERSION_ARCH.deb of a built program
# The same program gives the same bytes: times are SOURCE_DATE_EPOCH, owners root, the order is fixed.

debian_package() {
    local binary=$1 version=$2 out=$3 tree name command shell
    scratch tree
    chmod 755 "$tree"
    name=qchain_${version}_$(dpkg --print-architecture).deb
    install -D --mode 755 "$binary" "$tree/usr/bin/qchain"
    install -D --mode 644 packaging/qchain.service "$tree/usr/lib/systemd/system/qchain.service"
    install -D --mode 644 --target-directory "$tree/usr/share/doc/qchain" README.md CHANGELOG.md
    install -D --mode 644 LICENSE "$tree/usr/share/doc/qchain/copyright"
    install -D --mode 644 scripts/qchain.toml.example "$tree/usr/share/doc/qchain/examples/qchain.toml"
    install -D --mode 644 --target-directory "$tree/usr/share/doc/qchain/examples" \
        packaging/stores.conf packaging/grafana-dashboard.json packaging/prometheus-alerts.yml
    install --directory --mode 755 "$tree/usr/share/man/man1" "$tree/usr/share/bash-completion/completions" \
        "$tree/usr/share/zsh/vendor-completions" "$tree/usr/share/fish/vendor_completions.d"
    "$binary" docs man | gzip --no-name --best >"$tree/usr/share/man/man1/qchain.1.gz"
    while read -r command; do
        "$binary" docs man "$command" | gzip --no-name --best >"$tree/usr/share/man/man1/qchain-$command.1.gz"
    done < <("$binary" docs commands)
    for shell in bash:bash-completion/completions/qchain zsh:zsh/vendor-completions/_qchain fish:fish/vendor_completions.d/qchain.fish; do
        "$binary" docs completion "${shell%%:*}" >"$tree/usr/share/${shell#*:}"
    done
    install --directory --mode 755 "$tree/DEBIAN"
    install --mode 755 --target-directory "$tree/DEBIAN" packaging/debian/{postinst,prerm,postrm}
    cat >"$tree/DEBIAN/control" <<CONTROL
Package: qchain
Version: $version
Architecture: $(dpkg --print-architecture)
Maintainer: The qchain developers
Section: admin
Priority: optional
Installed-Size: $(du --summarize --apparent-size --block-size=1K "$tree/usr" | cut -f1)
Description: Storage-side owner of qcow2 snapshot chains of CloudStack
 Deletes a snapshot from the middle of its chain on secondary storage by merging
 it into its children, proves that every survivor reads as before, finds damage,
 flattens, and serves all that as durable jobs over HTTP, with a page.
CONTROL
    find "$tree" -newermt "@$SOURCE_DATE_EPOCH" -exec touch --no-dereference --date "@$SOURCE_DATE_EPOCH" {} +
    mkdir --parents "$out"
    quietly dpkg-deb --root-owner-group -Zxz --build "$tree" "$out/$name"
    DEBIAN_PACKAGE=$out/$name
}
