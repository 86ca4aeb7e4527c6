# Sourced after common.sh, never run. Gives:
#   need_nfs                install nfs-ganesha, its backend for mounts, and rpcbind
#   need_qemu_nfs           QEMU's module for nfs://, of the very version that is installed; sets QEMU_MODULE_DIR, or QEMU_NFS_MISSING to a reason
#   nfs_start DIRECTORY     export it on 127.0.0.1 (needs root); sets NFS_PORT, NFS_MOUNT_PORT, NFS_PID, QCHAIN_NFS_URL and QCHAIN_NFS_DIR
#   nfs_stop                stop what was started; done by the end of the script at the latest
#
# The server registers itself with an rpcbind, or does not start. Theirs runs in a network of its own, so that nothing listens on
# port 111, and both see an empty /run of their own, so that nothing is left there and no other rpcbind is disturbed.

NFS_LIBRARY=${BASH_SOURCE[0]%/*}
NFS_PID='' NFS_RPCBIND_PID=''

need_nfs() {
    need unshare nsenter flock ganesha.nfsd rpcbind
    # The backend is a plugin without a command of its own.
    compgen -G '/usr/lib/*/ganesha/libfsalvfs.so' >/dev/null || install_packages nfs-ganesha-vfs
}

# The package that has it is of the same version as qemu-utils or is not loaded, and Debian 12 has its newer QEMU in backports, which need
# not be among the sources: it is fetched from there into a folder of ours, and nothing is installed, so that no QEMU is replaced.
need_qemu_nfs() {
    local version release part apt
    version=$(dpkg-query --show --showformat '${Version}' qemu-utils 2>/dev/null) || version=''
    # shellcheck disable=SC1091
    release=$(. /etc/os-release && echo "${VERSION_CODENAME-}")
    scratch QEMU_NFS
    chmod 755 "$QEMU_NFS"
    mkdir "$QEMU_NFS/lists" "$QEMU_NFS/cache" "$QEMU_NFS/modules"
    for part in "" -backports -updates; do
        echo "deb http://deb.debian.org/debian $release$part main"
    done >"$QEMU_NFS/sources"
    apt=(apt-get -o "Dir::Etc::SourceList=$QEMU_NFS/sources" -o Dir::Etc::SourceParts=- -o "Dir::State::Lists=$QEMU_NFS/lists" -o "Dir::Cache=$QEMU_NFS/cache")
    if [[ -n $version && -n $release ]] && (cd "$QEMU_NFS" && "${apt[@]}" update && "${apt[@]}" download "qemu-block-extra=$version" && dpkg-deb --extract qemu-block-extra_*.deb tree) >"$QEMU_NFS/said" 2>&1; then
        cp "$QEMU_NFS"/tree/usr/lib/*/qemu/block-nfs.so "$QEMU_NFS/modules"
        export QEMU_MODULE_DIR=$QEMU_NFS/modules
    else
        export QEMU_NFS_MISSING="qemu-block-extra ${version:-of no known version} could not be fetched: $(tail -n 1 "$QEMU_NFS/said" 2>/dev/null)"
    fi
}

nfs_ended() {
    local state
    { read -r _ _ state _ <"/proc/$1/stat"; } 2>/dev/null || return 0
    [[ $state == Z ]]
}

# Ends a process of ours: politely, then not.
nfs_end() {
    local pid=$1 try
    [[ -n $pid ]] || return 0
    kill -CONT "$pid" 2>/dev/null || true
    kill "$pid" 2>/dev/null || true
    for ((try = 0; try < 100; try++)); do
        if nfs_ended "$pid"; then break; fi
        sleep 0.1
    done
    kill -KILL "$pid" 2>/dev/null || true
    wait "$pid" 2>/dev/null || true
}

nfs_stop() {
    nfs_end "$NFS_PID"
    nfs_end "$NFS_RPCBIND_PID"
    NFS_PID='' NFS_RPCBIND_PID=''
}

# The places that rpcbind and the server write to, in a view of their own that goes with them.
NFS_PRIVATE='mount -t tmpfs -o mode=755 tmpfs /run && mkdir /run/rpcbind /run/ganesha && mkdir -p /var/lib/nfs &&
    mount -t tmpfs -o mode=755 tmpfs /var/lib/nfs && exec unshare --net rpcbind -f'

nfs_start() {
    local directory try
    directory=$(realpath "$1")
    [[ $(id -u) == 0 ]] || die "an NFS server needs root"
    scratch NFS_PLACE
    # All servers that scripts start are one after the other: they have the same ports. The program is a file that all of them have.
    exec {NFS_LOCK}<"$(command -v ganesha.nfsd)"
    flock "$NFS_LOCK"
    NFS_PORT=20490 NFS_MOUNT_PORT=20491
    UNDO_ACTIONS+=(nfs_stop)
    sed -e "s|@PORT@|$NFS_PORT|; s|@MOUNT_PORT@|$NFS_MOUNT_PORT|; s|@DIRECTORY@|$directory|; s|@ACCESS@|RW|; s|@SQUASH@|No_Root_Squash|" "$NFS_LIBRARY/ganesha.conf" >"$NFS_PLACE/ganesha.conf"
    unshare --mount --propagation slave sh -c "$NFS_PRIVATE" >"$NFS_PLACE/rpcbind.out" 2>&1 {NFS_LOCK}>&- &
    NFS_RPCBIND_PID=$!
    for ((try = 0; try < 200; try++)); do
        [[ ! -S /proc/$NFS_RPCBIND_PID/root/run/rpcbind.sock ]] || break
        sleep 0.05
    done
    sleep 0.1
    nsenter --mount="/proc/$NFS_RPCBIND_PID/ns/mnt" ganesha.nfsd -F -f "$NFS_PLACE/ganesha.conf" -p "$NFS_PLACE/ganesha.pid" -L "$NFS_PLACE/ganesha.log" \
        -N NIV_EVENT >"$NFS_PLACE/ganesha.out" 2>&1 {NFS_LOCK}>&- &
    NFS_PID=$!
    for ((try = 0; try < 200; try++)); do
        if nfs_ended "$NFS_PID"; then break; fi
        if (exec 3<>"/dev/tcp/127.0.0.1/$NFS_PORT") 2>/dev/null; then
            export QCHAIN_NFS_URL="nfs://127.0.0.1:$NFS_PORT/export?mountport=$NFS_MOUNT_PORT" QCHAIN_NFS_DIR=$directory
            return 0
        fi
        sleep 0.05
    done
    tail -n 20 "$NFS_PLACE/rpcbind.out" "$NFS_PLACE/ganesha.out" "$NFS_PLACE/ganesha.log" >&2 || true
    die "the NFS server did not start"
}
