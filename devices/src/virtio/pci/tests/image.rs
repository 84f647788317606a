//! The copy of configuration space that a guest reads.

use std::collections::BTreeMap;

use super::*;
use crate::pci::ConfigImage;

/// Pages as the guest reads them.
#[derive(Default)]
struct Image(Mutex<BTreeMap<u8, Option<Vec<u8>>>>);

impl Image {
    /// The page of the function; `None` when its reads reach the function.
    fn page(&self) -> Option<Vec<u8>> {
        let slot = u8::try_from(SLOT).unwrap();
        self.0.lock().unwrap()[&slot].clone()
    }
}

impl ConfigImage for Image {
    fn store(&self, slot: u8, offset: u16, bytes: &[u8]) {
        assert_eq!((offset % 4, bytes.len() % 4), (0, 0));
        let mut pages = self.0.lock().unwrap();
        let page = pages.entry(slot).or_insert_with(|| Some(vec![0; 4096]));
        let page = page
            .as_mut()
            .expect("nothing is stored after the withdrawal");
        page[usize::from(offset)..][..bytes.len()].copy_from_slice(bytes);
    }

    fn withdraw(&self, slot: u8) {
        let page = self.0.lock().unwrap().insert(slot, None);
        assert!(page.is_some_and(|page| page.is_some()), "withdrawn once");
    }
}

fn published() -> (Driver, Arc<Image>) {
    let (driver, _) = recording();
    let image = Arc::new(Image::default());
    driver
        .root
        .publish(Arc::clone(&image) as Arc<dyn ConfigImage>);
    (driver, image)
}

fn whole(driver: &Driver) -> Vec<u8> {
    driver.config::<4096>(0).to_vec()
}

#[test]
fn image_is_the_bridge_and_the_function() {
    let (driver, image) = published();
    assert_eq!(image.page(), Some(whole(&driver)));
    let mut bridge = [0; 4096];
    driver.root.read(0, &mut bridge);
    driver.root.write(0x3c, &[7]);
    driver.root.read(0, &mut bridge);
    assert_eq!(image.0.lock().unwrap()[&0], Some(bridge.to_vec()));
    assert_eq!(bridge[0x3c], 7);
}

#[test]
fn reset_of_the_function_is_in_the_image() {
    let (driver, image) = published();
    driver.set_config_bytes(0x10, &(BAR + 0x10_0000).to_le_bytes());
    assert_eq!(image.page(), Some(whole(&driver)));
    driver.set_config(driver.capability(0x10) + 8, 0x8000);
    let page = image.page().unwrap();
    assert_eq!(page, whole(&driver));
    assert_eq!(page[4..6], [0, 0], "the command register");
}

#[test]
fn function_whose_window_is_open_is_read_by_exits() {
    let (driver, image) = published();
    let at = driver.window();
    driver.set_config_bytes(at + 8, &20_u32.to_le_bytes());
    assert!(image.page().is_some(), "its length is 0");
    driver.set_config_bytes(at + 12, &1_u32.to_le_bytes());
    assert_eq!(image.page(), None);
    driver.set_config_bytes(at + 12, &0_u32.to_le_bytes());
    assert_eq!(image.page(), None, "for good");
}

proptest! {
    #[test]
    fn image_is_what_reads_return(
        writes in proptest::collection::vec(
            (prop_oneof![0_u64..0x120, 0_u64..4093], 1_usize..=4, any::<[u8; 4]>()),
            1..40,
        ),
    ) {
        let (driver, image) = published();
        for (at, len, bytes) in writes {
            driver.set_config_bytes(at, &bytes[..len]);
            if let Some(page) = image.page() {
                prop_assert!(page == whole(&driver), "after a write at {:#x}", at);
            }
        }
    }
}
