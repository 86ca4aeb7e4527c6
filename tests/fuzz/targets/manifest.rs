//! libFuzzer's way to `qchain_fuzz::manifest`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| qchain_fuzz::manifest(data));
