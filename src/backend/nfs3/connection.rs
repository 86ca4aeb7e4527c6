//! One connection: TCP, records, one call at a time.
//!
//! `nfs3_client` speaks RPC over whatever reads and writes; [`Wire`] is that, with what it leaves open: the end of
//! the stream is an error (the client would ask for ever), a record is no longer than any honest reply, and one in
//! several fragments is put together. It knows no time: whoever calls sets the limit, and drops the connection
//! after any error and any call that was given up.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU16, Ordering};

use nfs3_client::io::{AsyncRead, AsyncWrite};
use nfs3_client::rpc::RpcClient;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};

/// The longest reply: the most data that is asked for, and what stands around it.
const MAX_RECORD_BYTES: usize = super::wire::MAX_DATA_BYTES + (64 << 10);
/// The bit of a fragment's length that says it is the last one.
const LAST: u32 = 1 << 31;

/// Ports that only root may take, as the kernel's own client picks them.
const RESERVED: std::ops::Range<u16> = 665..1024;
/// How many of those are tried.
const RESERVED_TRIES: u16 = 64;

/// A connection that calls can be made on.
pub(super) type Rpc = RpcClient<Wire>;

/// A stream of records.
pub(super) struct Wire {
    stream: TcpStream,
    /// What comes next: a record's length, or a whole record that was put together, with its length.
    ready: Vec<u8>,
    /// How much of that was taken.
    served: usize,
    /// How much of the record is still in the stream.
    left: usize,
}

impl Wire {
    fn new(stream: TcpStream) -> Self {
        Self { stream, ready: Vec::new(), served: 0, left: 0 }
    }

    /// Reads the length of the next record; all of it, if it comes in pieces.
    async fn begin_record(&mut self) -> io::Result<()> {
        let mut head = self.head().await?;
        self.served = 0;
        self.ready.clear();
        if head & LAST != 0 {
            self.left = fitting(0, head)?;
            self.ready.extend(head.to_be_bytes());
            return Ok(());
        }
        let mut record = Vec::new();
        loop {
            let start = record.len();
            record.resize(fitting(start, head)?, 0);
            self.stream.read_exact(record.get_mut(start..).unwrap_or_default()).await?;
            if head & LAST != 0 {
                break;
            }
            head = self.head().await?;
        }
        let length = u32::try_from(record.len()).map_err(io::Error::other)?;
        self.ready.extend((length | LAST).to_be_bytes());
        self.ready.append(&mut record);
        Ok(())
    }

    /// The head of a fragment.
    async fn head(&mut self) -> io::Result<u32> {
        let mut head = [0; 4];
        self.stream.read_exact(&mut head).await?;
        Ok(u32::from_be_bytes(head))
    }
}

/// The length of a record with one more fragment, if that is no more than a reply may have.
fn fitting(before: usize, head: u32) -> io::Result<usize> {
    let length = usize::try_from(head & !LAST).unwrap_or(usize::MAX).saturating_add(before);
    if length > MAX_RECORD_BYTES {
        let message = format!("it announced a reply of {length} bytes");
        return Err(io::Error::new(io::ErrorKind::InvalidData, message));
    }
    Ok(length)
}

impl AsyncRead for Wire {
    async fn async_read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        if self.served == self.ready.len() && self.left == 0 {
            self.begin_record().await?;
        }
        let ready = self.ready.get(self.served..).unwrap_or_default();
        if !ready.is_empty() {
            let count = ready.len().min(buffer.len());
            let (place, source) = (buffer.get_mut(..count), ready.get(..count));
            place.unwrap_or_default().copy_from_slice(source.unwrap_or_default());
            self.served += count;
            return Ok(count);
        }
        let most = self.left.min(buffer.len());
        let count = self.stream.read(buffer.get_mut(..most).unwrap_or_default()).await?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left -= count;
        Ok(count)
    }
}

impl AsyncWrite for Wire {
    async fn async_write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match self.stream.write(buffer).await? {
            0 if !buffer.is_empty() => Err(io::ErrorKind::WriteZero.into()),
            count => Ok(count),
        }
    }
}

/// Connects to the first of these addresses that answers. With `reserved` from a port that only root may take, as
/// servers may insist on; if none is to be had, from any.
pub(super) async fn connect(addresses: &[SocketAddr], reserved: bool) -> io::Result<Wire> {
    let mut failed = io::Error::new(io::ErrorKind::NotFound, "it has no address");
    for &address in addresses {
        let connected = if reserved { connect_reserved(address).await } else { connect_any(address).await };
        match connected {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                return Ok(Wire::new(stream));
            }
            Err(error) => failed = error,
        }
    }
    Err(failed)
}

async fn connect_any(address: SocketAddr) -> io::Result<TcpStream> {
    TcpStream::connect(address).await
}

async fn connect_reserved(address: SocketAddr) -> io::Result<TcpStream> {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    // Processes begin at different ones.
    let begin = u16::try_from(std::process::id() % u32::from(u16::MAX)).unwrap_or_default();
    for _ in 0..RESERVED_TRIES {
        let turn = NEXT.fetch_add(1, Ordering::Relaxed).wrapping_add(begin);
        let port = RESERVED.start + turn % (RESERVED.end - RESERVED.start);
        let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        socket.set_reuseaddr(true)?;
        let any: std::net::IpAddr = if address.is_ipv4() {
            std::net::Ipv4Addr::UNSPECIFIED.into()
        } else {
            std::net::Ipv6Addr::UNSPECIFIED.into()
        };
        if let Err(error) = socket.bind(SocketAddr::new(any, port)) {
            if error.kind() == io::ErrorKind::AddrInUse {
                continue;
            }
            break;
        }
        match socket.connect(address).await {
            Err(error)
                if matches!(error.kind(), io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable) => {}
            connected => return connected,
        }
    }
    connect_any(address).await
}
