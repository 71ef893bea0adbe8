#![no_main]

#[path = "../../tests/fuzz_targets/mod.rs"]
#[allow(dead_code, reason = "each target calls one of these functions")]
mod targets;

libfuzzer_sys::fuzz_target!(|data: &[u8]| targets::proxy(data));
