//! Reading ahead: where a store takes its time to answer, more threads than there are processors read, so that there is
//! always something to be hashed.

use std::sync::OnceLock;

use rayon::{ThreadPool, ThreadPoolBuilder};

/// How many threads read from stores that want that. Each holds one piece of what it reads.
const READERS: usize = 8;

/// Does work in parallel: on as many threads as there are processors, or on more if files want more than so many reads
/// at once (`wanted`, see [`crate::backend::StoreFile::reads_at_once`]).
pub fn at_once<T: Send>(wanted: usize, work: impl FnOnce() -> T + Send) -> T {
    static POOL: OnceLock<Option<ThreadPool>> = OnceLock::new();
    if wanted <= rayon::current_num_threads() {
        return work();
    }
    let made =
        || ThreadPoolBuilder::new().num_threads(READERS).thread_name(|_| "reader".to_owned()).build().ok();
    match POOL.get_or_init(made) {
        Some(pool) => pool.install(work),
        // A system that has no more threads to give.
        None => work(),
    }
}

#[cfg(test)]
mod tests {
    use super::{READERS, at_once};

    #[test]
    fn more_threads_only_where_they_are_wanted() {
        let own = rayon::current_num_threads();
        assert_eq!(at_once(0, rayon::current_num_threads), own);
        assert_eq!(at_once(own + 1, rayon::current_num_threads), READERS);
        assert_eq!(at_once(own + 1, || at_once(READERS, rayon::current_num_threads)), READERS);
    }
}
