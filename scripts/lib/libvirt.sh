# Sourced after common.sh, never run. Gives:
#   need_libvirt    libvirtd with its QEMU driver, virsh, and qemu-system-x86_64
#   need_qemu_http  the module by which QEMU reads http:// URLs
#
# All of QEMU's packages must come from one suite: the stable one's qemu-system-x86 cannot be installed beside a newer qemu-utils,
# say from backports, and apt would remove that. So where the plain installation would remove something, QEMU and libvirt are taken
# from the backports of the same archive. That is done with a list of sources and preferences of our own, for this one call: the
# machine's own sources and pins stay as they are, and later upgrades do not follow backports because of us.

LIBVIRT_COMMANDS=(qemu-system-x86_64 libvirtd virsh)
# The driver is a plugin without a command of its own.
LIBVIRT_PACKAGES=(qemu-system-x86 libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients)

need_libvirt() {
    local command missing='' packages=("${LIBVIRT_PACKAGES[@]}")
    for command in "${LIBVIRT_COMMANDS[@]}"; do
        command -v "$command" >/dev/null || missing=1
    done
    compgen -G '/usr/lib/*/libvirt/connection-driver/libvirt_driver_qemu.so' >/dev/null || missing=1
    [[ -n $missing ]] || return 0
    if can_install_plainly "${packages[@]}"; then
        install_packages "${packages[@]}"
    else
        install_from_backports "${packages[@]}"
    fi
    hash -r
    for command in "${LIBVIRT_COMMANDS[@]}"; do
        command -v "$command" >/dev/null || die "$command is still missing; install it by hand"
    done
}

need_qemu_http() {
    # What has no module of its own has it built in, or says that it does not know the protocol.
    quietly_knows_http && return 0
    if can_install_plainly qemu-block-extra; then
        install_packages qemu-block-extra
    else
        install_from_backports qemu-block-extra
    fi
    quietly_knows_http || die "QEMU still reads no http:// URL; install its curl block driver by hand"
}

quietly_knows_http() {
    # Nobody listens there, so it fails either way: only another error than that says that it was tried.
    local said
    said=$(qemu-img info http://127.0.0.1:1/ 2>&1 || true)
    ! grep --quiet --ignore-case 'unknown protocol\|unknown driver\|failed to load\|unable to load' <<<"$said"
}

# Whether nothing has to go for it.
can_install_plainly() {
    [[ $(id -u) == 0 ]] || die "missing packages: $*; install them, or run this as root"
    command -v apt-get >/dev/null || die "missing, and there is no apt-get to install them: $*"
    [[ -n $APT_UPDATED ]] || quietly apt-get update
    APT_UPDATED=1
    apt-get install --simulate --no-install-recommends --no-remove --no-upgrade "$@" >/dev/null 2>&1
}

install_from_backports() {
    local ID VERSION_CODENAME site own
    # shellcheck disable=SC1091
    source /etc/os-release
    [[ $ID == debian ]] || die "$* cannot be installed without removing something; install them by hand"
    # Wherever this machine has its Debian from.
    site=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' "Codename: $VERSION_CODENAME" | sort --unique | head -n 1)
    [[ -n $site ]] || die "apt has no source of $VERSION_CODENAME; install $* by hand"
    scratch APT_PLACE
    mkdir --parents "$APT_PLACE/lists/partial"
    # Readable for apt's own user.
    chmod 755 "$APT_PLACE"
    local suite key=/usr/share/keyrings/debian-archive-keyring.gpg
    for suite in "$VERSION_CODENAME" "$VERSION_CODENAME-updates" "$VERSION_CODENAME-backports"; do
        echo "deb [signed-by=$key] $site $suite main"
    done >"$APT_PLACE/sources"
    # Nothing else comes from there, least of all a newer systemd.
    printf 'Package: src:qemu src:libvirt src:seabios\nPin: release n=%s-backports\nPin-Priority: 900\n' \
        "$VERSION_CODENAME" >"$APT_PLACE/preferences"
    own=(-o "Dir::Etc::SourceList=$APT_PLACE/sources" -o Dir::Etc::SourceParts=/dev/null -o "Dir::Etc::Preferences=$APT_PLACE/preferences"
        -o "Dir::State::Lists=$APT_PLACE/lists" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache=)
    echo "installing $* from $VERSION_CODENAME-backports, beside the newer QEMU that is here" >&2
    quietly apt-get "${own[@]}" update
    DEBIAN_FRONTEND=noninteractive quietly apt-get "${own[@]}" install --yes --no-install-recommends --no-remove --no-upgrade "$@"
}
