//! libFuzzer's way to `qchain_fuzz::image`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| qchain_fuzz::image(data));
