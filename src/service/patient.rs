//! A stream whose other side may take its time, but not for ever: who takes nothing for long is cut off, whatever is kept
//! for him goes.

use std::io::{Error, ErrorKind, IoSlice, Result};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep};

/// A stream that fails when what is written was not taken for so long.
pub struct Patient<S> {
    stream: S,
    longest: Duration,
    /// Since when something waits to be taken.
    patience: Pin<Box<Sleep>>,
    waits: bool,
}

impl<S> Patient<S> {
    /// With so much patience.
    pub fn new(stream: S, longest: Duration) -> Self {
        Self { stream, longest, patience: Box::pin(sleep(longest)), waits: false }
    }

    /// What became of a write.
    fn judged<T>(&mut self, context: &mut Context<'_>, done: Poll<Result<T>>) -> Poll<Result<T>> {
        if done.is_ready() {
            self.waits = false;
            return done;
        }
        if !self.waits {
            self.waits = true;
            self.patience.as_mut().reset(Instant::now() + self.longest);
        }
        self.patience.as_mut().poll(context).map(|()| Err(Error::from(ErrorKind::TimedOut)))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Patient<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Patient<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize>> {
        let done = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.judged(context, done)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<Result<usize>> {
        let done = Pin::new(&mut self.stream).poll_write_vectored(context, bytes);
        self.judged(context, done)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        let done = Pin::new(&mut self.stream).poll_flush(context);
        self.judged(context, done)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        let done = Pin::new(&mut self.stream).poll_shutdown(context);
        self.judged(context, done)
    }
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;
    use std::time::{Duration, Instant};

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

    use super::Patient;

    const LONGEST: Duration = Duration::from_millis(200);

    fn block_on<T>(work: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(work)
    }

    #[test]
    fn who_takes_nothing_is_cut_off() {
        block_on(async {
            let (near, _far) = duplex(10);
            let mut near = Patient::new(near, LONGEST);
            tokio::time::sleep(2 * LONGEST).await;
            near.write_all(&[0; 10]).await.unwrap();
            let begun = Instant::now();
            let error = near.write_all(&[0; 1]).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::TimedOut);
            assert!(begun.elapsed() >= LONGEST);
        });
    }

    #[test]
    fn who_takes_little_by_little_is_served() {
        block_on(async {
            let (near, mut far) = duplex(10);
            let mut near = Patient::new(near, LONGEST);
            let taking = async {
                for _ in 0..10 {
                    tokio::time::sleep(LONGEST / 4).await;
                    far.read_exact(&mut [0; 10]).await.unwrap();
                }
            };
            let (given, ()) = tokio::join!(near.write_all(&[0; 100]), taking);
            given.unwrap();
        });
    }
}
