# Sourced by the scripts beside it, never run. Gives:
#   need COMMAND...               install the Debian packages of those commands that are missing
#   need_blake3                   PyPI's blake3 for python3
#   need_rust [COMPONENT...]      cargo, a linker for it, and components of the toolchain
#   need_promtool                 promtool, at $PROMTOOL
#   need_sshd                     sshd
#   loop_mount FS IMAGE SIZE DIR  make a file system in a sparse file and mount it
#   loop_direct DIR               let its loop device hand on requests as they come, many at once as a disk takes them: the buffered
#                                 one answers one read after the other, and keeps all twice in memory
#   can_loop_mount                whether that can work here
#   scratch NAME                  set variable NAME to a fresh directory that goes away with this process
#   quietly COMMAND...            run it; show what it said only if it fails
# What was mounted and made is undone when the sourcing script ends, however it ends.

# Where mkfs and losetup lie, which a plain `su` leaves out.
PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"
export LC_ALL=C.UTF-8

die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

# -- Cleaning up ------------------------------------------------------------------------------------------------------------

# Functions, called without arguments.
UNDO_ACTIONS=()
UNDO_MOUNTS=()
UNDO_FILES=()

undo() {
    local status=$? at
    trap - EXIT
    trap '' INT TERM HUP
    for ((at = ${#UNDO_ACTIONS[@]} - 1; at >= 0; at--)); do
        "${UNDO_ACTIONS[at]}" || true
    done
    for ((at = ${#UNDO_MOUNTS[@]} - 1; at >= 0; at--)); do
        # A process that was just ended may hold its files a moment longer.
        for _ in 1 2 3 4 5 6 7 8 9 10; do
            umount "${UNDO_MOUNTS[at]}" 2>/dev/null && continue 2
            sleep 0.2
        done
        # Lazily: the loop device frees itself once its last user is gone.
        umount --lazy "${UNDO_MOUNTS[at]}" 2>/dev/null || true
    done
    for ((at = ${#UNDO_FILES[@]} - 1; at >= 0; at--)); do
        # Never across a mount that could not be taken down.
        rm --recursive --force --one-file-system -- "${UNDO_FILES[at]}"
    done
    exit "$status"
}

trap undo EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP

scratch() {
    local -n place=$1
    place=$(mktemp --directory --tmpdir qchain-XXXXXX)
    UNDO_FILES+=("$place")
}

# -- What has to be installed -----------------------------------------------------------------------------------------------

package_of() {
    case $1 in
        qemu-img | qemu-io | qemu-nbd) echo qemu-utils ;;
        # In Debian 12; later releases, and backports to it, have it in qemu-utils, so that is installed first.
        qemu-storage-daemon) echo qemu-system-common ;;
        mkfs.xfs | xfs_io) echo xfsprogs ;;
        mkfs.btrfs) echo btrfs-progs ;;
        mkfs.ext4 | filefrag) echo e2fsprogs ;;
        setfacl | getfacl) echo acl ;;
        setfattr | getfattr) echo attr ;;
        mount | umount) echo mount ;;
        losetup | findmnt | flock | setpriv | fallocate | unshare | nsenter) echo util-linux ;;
        python3) echo python3 ;;
        cc) echo gcc libc6-dev ;;
        c++) echo g++ ;;
        git) echo git ;;
        strace) echo strace ;;
        # Without the service that the whole server comes with.
        mariadbd | mariadb-install-db) echo mariadb-server-core ;;
        mariadb) echo mariadb-client-core ;;
        # The server's backend for mounts is a package of its own, without a command.
        ganesha.nfsd) echo nfs-ganesha nfs-ganesha-vfs ;;
        rpcbind) echo rpcbind ;;
        nfs-cp) echo libnfs-utils ;;
        curl) echo curl ;;
        rsync) echo rsync ;;
        scp | ssh-keygen) echo openssh-client ;;
        sshd) echo openssh-server ;;
        rclone) echo rclone ;;
        aria2c) echo aria2 ;;
        # Without the modules that the usual one comes with.
        nginx) echo nginx-light ;;
        chromium) echo chromium ;;
        chromedriver) echo chromium-driver ;;
        systemd-analyze) echo systemd ;;
        dpkg-deb) echo dpkg ;;
        file) echo file ;;
        readelf | strip) echo binutils ;;
        *) die "no package is known for $1" ;;
    esac
}

APT_UPDATED=

install_packages() {
    [[ $(id -u) == 0 ]] || die "missing packages: $*; install them, or run this as root"
    command -v apt-get >/dev/null || die "missing, and there is no apt-get to install them: $*"
    echo "installing $*" >&2
    if [[ -z $APT_UPDATED ]]; then
        quietly apt-get update
        APT_UPDATED=1
    fi
    # What is there stays as it is: a newer QEMU from elsewhere is neither replaced nor removed.
    DEBIAN_FRONTEND=noninteractive quietly apt-get install --yes --no-install-recommends --no-remove --no-upgrade "$@"
}

need() {
    local command late=() packages=()
    for command in "$@"; do
        command -v "$command" >/dev/null && continue
        if [[ $command == qemu-storage-daemon ]]; then
            late+=("$command")
            packages+=(qemu-utils)
        else
            # shellcheck disable=SC2207 # words without blanks
            packages+=($(package_of "$command"))
        fi
    done
    ((${#packages[@]} == 0)) || install_packages "${packages[@]}"
    for command in "${late[@]}"; do
        command -v "$command" >/dev/null || install_packages "$(package_of "$command")"
    done
    hash -r
    for command in "$@"; do
        command -v "$command" >/dev/null || die "$command is still missing; install it by hand"
    done
}

need_blake3() {
    local options=()
    python3 -c 'import blake3' 2>/dev/null && return
    python3 -m pip --version >/dev/null 2>&1 || install_packages python3-pip
    # Where the system's own packages are kept apart from PyPI's.
    python3 -m pip install --help | grep --quiet -- --break-system-packages && options=(--break-system-packages)
    quietly python3 -m pip install --quiet "${options[@]}" blake3
}

need_rust() {
    if ! command -v cargo >/dev/null && [[ -r ${CARGO_HOME:-${HOME:-/root}/.cargo}/env ]]; then
        # shellcheck disable=SC1091
        source "${CARGO_HOME:-${HOME:-/root}/.cargo}/env"
    fi
    command -v cargo >/dev/null || die "no cargo; install Rust with rustup first"
    need cc
    local component
    for component in "$@"; do
        # A toolchain without rustup has to bring them itself.
        cargo "${component/rustfmt/fmt}" --version >/dev/null 2>&1 || quietly rustup component add "$component"
    done
}

# Debian has it in the package of the server, which would be started: only this file is taken out of it.
need_promtool() {
    local directory
    directory=$(realpath --canonicalize-missing "${CARGO_TARGET_DIR:-target}")/tools/bin
    PROMTOOL=$(command -v promtool || echo "$directory/promtool")
    [[ ! -x $PROMTOOL ]] || return 0
    scratch PROMETHEUS
    if [[ -z $APT_UPDATED ]]; then
        quietly apt-get update
        APT_UPDATED=1
    fi
    chmod 777 "$PROMETHEUS"
    (cd "$PROMETHEUS" && quietly apt-get download prometheus && dpkg-deb --extract prometheus_*.deb .)
    install -D --mode 755 "$PROMETHEUS/usr/bin/promtool" "$PROMTOOL"
}

# Without its service being started.
need_sshd() {
    local policy=/usr/sbin/policy-rc.d
    command -v sshd >/dev/null && return
    if [[ ! -e $policy && $(id -u) == 0 ]]; then
        UNDO_FILES+=("$policy")
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod 755 "$policy"
        need sshd
        rm --force "$policy"
    else
        need sshd
    fi
}

quietly() {
    local said
    if ! said=$("$@" 2>&1 </dev/null); then
        printf '%s\n' "$said" >&2
        die "failed: $*"
    fi
}

# -- File systems -----------------------------------------------------------------------------------------------------------

can_loop_mount() {
    [[ $(id -u) == 0 ]] && losetup --find >/dev/null 2>&1
}

loop_mount() {
    local fs=$1 image=$2 size=$3 directory=$4
    rm --force "$image"
    truncate --size "$size" "$image"
    UNDO_FILES+=("$image")
    case $fs in
        xfs) quietly mkfs.xfs -q -m reflink=1 "$image" ;;
        btrfs) quietly mkfs.btrfs -q "$image" ;;
        ext4) quietly mkfs.ext4 -q -F "$image" ;;
        *) die "unknown file system $fs" ;;
    esac
    mkdir --parents "$directory"
    # `mount` sets the loop device to vanish with the mount.
    quietly mount -o loop,noatime "$image" "$directory"
    UNDO_MOUNTS+=("$directory")
}

loop_direct() {
    local device
    device=$(findmnt --noheadings --output SOURCE --mountpoint "$1")
    quietly losetup --direct-io=on "$device"
}
