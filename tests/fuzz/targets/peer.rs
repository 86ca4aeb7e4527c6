//! libFuzzer's way to `qchain_fuzz::peer`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| qchain_fuzz::peer(data));
