//! Standard output as bytes: no buffer in between, and as large a pipe as may be had.

use std::io;

use rustix::io::retry_on_intr;

/// How large a pipe's buffer is asked to be, in bytes: what any user may have by default.
const PIPE_BYTES: usize = 1 << 20;

/// The process's standard output.
#[derive(Debug)]
pub struct StandardOutput(());

impl StandardOutput {
    /// Takes it. Nobody else should write there meanwhile. A pipe is made larger if the system allows it.
    #[must_use]
    pub fn take() -> Self {
        // A smaller pipe is slower, and no more than that.
        let _ = rustix::pipe::fcntl_setpipe_size(rustix::stdio::stdout(), PIPE_BYTES);
        Self(())
    }
}

impl io::Write for StandardOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(retry_on_intr(|| rustix::io::write(rustix::stdio::stdout(), bytes))?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
