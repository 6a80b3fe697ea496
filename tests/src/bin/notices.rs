//! Prints the third-party notices of the program.
//!
//!     cargo run --package system-tests --bin notices > THIRD-PARTY-NOTICES.txt

fn main() {
    print!("{}", system_tests::third_party_notices());
}
